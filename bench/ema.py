"""The EMA op against the published loop and torch's multi-tensor calls, on a ViT's parameters."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Plan, Step
from vicreg_kernels.core import dispatch
from vicreg_kernels.ema import ema_update_

TITLE = "EMA update of a vision transformer's parameters"
CONTENDERS = {
    "published": "mul_ and add_, tensor by tensor",
    "foreach_mul_add": "_foreach_mul_ and _foreach_add_",
    "foreach_lerp": "_foreach_lerp_",
    "separate": "convert, lerp and copy, tensor by tensor",
    "foreach_separate": "convert, lerp and copy, multi-tensor",
}
MOMENTUM = 0.996
# width, depth, MLP width, patch size; V-JEPA's giant is the one of 40 blocks.
MODELS = {
    "vit_b": (768, 12, 3072, 16),
    "vit_l": (1024, 24, 4096, 16),
    "vit_g": (1408, 40, 6144, 16),
}


def parameter_shapes(width: int, depth: int, hidden: int, patch: int) -> list[tuple[int, ...]]:
    """Of a vision transformer at 224 x 224: embeddings, blocks, last norm."""
    shapes: list[tuple[int, ...]] = [(1, (224 // patch) ** 2, width), (width, 3, patch, patch)]
    shapes += [(width,)]
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    return [*shapes, *block * depth, (width,), (width,)]


def draw(
    shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


@torch.no_grad()
def published(targets: list[Tensor], onlines: list[Tensor]) -> None:
    """I-JEPA's and V-JEPA's loop."""
    for t, o in zip(targets, onlines, strict=True):
        t.mul_(MOMENTUM).add_(o, alpha=1 - MOMENTUM)


@torch.no_grad()
def foreach_mul_add(targets: list[Tensor], onlines: list[Tensor]) -> None:
    """V-JEPA 2's and lightly's."""
    torch._foreach_mul_(targets, MOMENTUM)
    torch._foreach_add_(targets, onlines, alpha=1 - MOMENTUM)


@torch.no_grad()
def foreach_lerp(targets: list[Tensor], onlines: list[Tensor]) -> None:
    """timm's and torch's."""
    torch._foreach_lerp_(targets, onlines, 1 - MOMENTUM)


@torch.no_grad()
def separate(targets: list[Tensor], onlines: list[Tensor], shadows: list[Tensor]) -> None:
    """A half student: convert, interpolate, round, tensor by tensor."""
    for t, o, s in zip(targets, onlines, shadows, strict=True):
        s.copy_(t.lerp_(o.to(t.dtype), 1 - MOMENTUM))


@torch.no_grad()
def foreach_separate(targets: list[Tensor], onlines: list[Tensor], shadows: list[Tensor]) -> None:
    """The same with torch's multi-tensor calls."""
    wide = [torch.empty_like(t) for t in targets]
    torch._foreach_copy_(wide, onlines)
    torch._foreach_lerp_(targets, wide, 1 - MOMENTUM)
    torch._foreach_copy_(shadows, targets)


def build(
    model: str, mixed: bool, device: torch.device, dtype: torch.dtype, backend: str | None
) -> Plan:
    """dtype: the student's. Mixed: a float32 teacher with a shadow of the student's dtype."""
    shapes = parameter_shapes(*MODELS[model])
    onlines = draw(shapes, device, dtype)
    targets = draw(shapes, device, torch.float32 if mixed else dtype, seed=1)
    shadows = [t.to(dtype) for t in targets] if mixed else []
    elements = sum(t.numel() for t in targets)

    def ours() -> list[Tensor]:
        ema_update_(targets, onlines, MOMENTUM, shadows=shadows or None, backend=backend)
        return [*targets, *shadows]

    steps: dict[str, Step] = {"ours": ours}
    if mixed:
        steps["separate"] = partial(separate, targets, onlines, shadows)
        steps["foreach_separate"] = partial(foreach_separate, targets, onlines, shadows)
    else:
        steps["published"] = partial(published, targets, onlines)
        steps["foreach_mul_add"] = partial(foreach_mul_add, targets, onlines)
        steps["foreach_lerp"] = partial(foreach_lerp, targets, onlines)
    sizes = [2 * t.element_size() for t in targets[:1]] + [o.element_size() for o in onlines[:1]]
    sizes += [s.element_size() for s in shadows[:1]]
    return Plan(
        steps,
        dispatch.choose("ema_update_", backend, device.type, dtype),
        least_bytes=sum(sizes) * elements,
        least_operations=3 * elements,
    )


def _case(model: str, mixed: bool, targets: dict[str, dict[str, float]], cpu: bool) -> Case:
    name = f"{model}-half-student" if mixed else model
    dtypes: dict[str, tuple[str, ...]] = {"cuda": ("bfloat16",) if mixed else ("float32",)}
    if cpu:
        dtypes["cpu"] = dtypes["cuda"]
    return Case(name, partial(build, model, mixed), targets, dtypes, quick=cpu)


_PLAIN = {
    "cpu": {"published": 1.25, "foreach_lerp": 1.0},
    "cuda": {"foreach_lerp": 1.0},
}
_MIXED = {"cpu": {"separate": 2.0}, "cuda": {}}
CASES = {
    case.name: case
    for case in (
        _case("vit_b", False, _PLAIN, cpu=True),
        _case("vit_b", True, _MIXED, cpu=True),
        _case("vit_l", False, _PLAIN, cpu=False),
        _case("vit_g", False, _PLAIN, cpu=False),
        _case("vit_l", True, _MIXED, cpu=False),
    )
}


def exercise(backend: str, device: str) -> int:
    """Every mix of dtypes, with and without a shadow, both roundings, flat and strided tensors."""
    bad = 0
    halves = (torch.bfloat16, torch.float16)
    pairs = [(t, o) for t in (torch.float32, *halves) for o in (torch.float32, *halves)]
    for target, online in pairs:
        for rounding in ("nearest", "stochastic"):
            shapes = [(1,), (7, 5), (1031,), (64, 40)]
            targets = draw(shapes, torch.device(device), target, seed=1)
            onlines = draw(shapes, torch.device(device), online)
            targets.append(targets[-1].clone()[::2, ::3])
            onlines.append(onlines[-1].t().contiguous().t()[::2, ::3])
            shadows = [t.bfloat16() for t in targets] if target == torch.float32 else None
            step = 1 if rounding == "stochastic" else None
            ema_update_(
                targets, onlines, MOMENTUM, shadows=shadows, rounding=rounding, step=step,
                backend=backend,
            )  # fmt: skip
            bad += sum(not t.isfinite().all().item() for t in [*targets, *(shadows or [])])
    return bad
