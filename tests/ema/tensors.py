"""Lists of tensors that the EMA's tests draw from, and the comparison of backends, bit by bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vicreg_kernels.ema import ema_update_

FUSED = (torch.float32, torch.bfloat16, torch.float16)
MOMENTA = (0.0, 0.3, 0.5, 0.996, 0.99925, 1.0)
ROUNDINGS = ("nearest", "stochastic")
# (target, online, shadow): all, and those in which two places have each pair of dtypes once.
MIXES = tuple(itertools.product(FUSED, repeat=3))
FEW_MIXES = tuple((FUSED[i], FUSED[j], FUSED[(i + j) % 3]) for i in range(3) for j in range(3))


def contiguous(*shape: int) -> Tensor:
    return torch.randn(shape)


def permuted(*shape: int) -> Tensor:
    """Dense, dimensions in the reverse order."""
    return torch.randn(shape[::-1]).permute(list(range(len(shape)))[::-1])


def spread(*shape: int) -> Tensor:
    """Every other element of each dimension, but three apart in the last."""
    steps = [2] * (len(shape) - 1) + [3] * bool(shape)
    whole = torch.randn([size * step for size, step in zip(shape, steps, strict=True)])
    return whole[tuple(slice(None, None, step) for step in steps)]


def shifted(*shape: int) -> Tensor:
    """Contiguous, at no aligned address."""
    count = torch.Size(shape).numel()
    return torch.randn(count + 3)[3:].reshape(shape)


def rows(*shape: int) -> Tensor:
    """Rows that lie apart."""
    return torch.randn(*shape[:-1], shape[-1] + 5)[..., : shape[-1]] if shape else torch.randn(())


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (contiguous, permuted, spread, shifted, rows)
}


def cast(z: Tensor, dtype: torch.dtype) -> Tensor:
    """To dtype, strides and gaps kept."""
    made = torch.empty_strided(z.shape, z.stride(), dtype=dtype)
    return made.copy_(z)


def every_dtype(
    shapes: Sequence[tuple[int, ...]],
    shadows: bool = True,
    layouts: Sequence[str] = tuple(LAYOUTS),
    mixes: Sequence[tuple[torch.dtype, ...]] = MIXES,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Each mix of dtypes in turn over the shapes; layouts come round in another rhythm."""
    targets, onlines, copies = [], [], []
    turn = itertools.cycle(itertools.product(layouts, repeat=2))
    for shape, dtypes in itertools.product(shapes, mixes):
        one, other = next(turn)
        made = [LAYOUTS[one](*shape), LAYOUTS[other](*shape), LAYOUTS[one](*shape)]
        for kept, z, dtype in zip((targets, onlines, copies), made, dtypes, strict=True):
            kept.append(cast(z, dtype))
    return targets, onlines, copies if shadows else []


def again(tensors: Sequence[Tensor], device: str | None = None) -> list[Tensor]:
    """Copies with the same strides."""
    return [
        torch.empty_strided(z.shape, z.stride(), dtype=z.dtype, device=device or z.device).copy_(z)
        for z in tensors
    ]


def bits(z: Tensor) -> Tensor:
    """As integers, all NaN alike."""
    z = z.detach().cpu().contiguous()
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[z.element_size()]
    return torch.where(z.isnan(), torch.tensor(float("nan"), dtype=z.dtype), z).view(kind)


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor], name: str) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == b.dtype
        wrong = (bits(a) != bits(b)).sum().item()
        assert wrong == 0, f"{name}[{i}] {tuple(a.shape)} {a.dtype}: {wrong} elements differ"


def assert_matches_reference(
    backend: str,
    targets: Sequence[Tensor],
    onlines: Sequence[Tensor],
    shadows: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    device: str = "cpu",
    **settings: object,
) -> None:
    """The backend on `device` gives the reference's bits, on the CPU, in targets and shadows."""
    mine, copies = again(targets, device), again(shadows, device)
    before = [z.clone() for z in onlines]
    others = list(onlines) if device == "cpu" else again(onlines, device)
    expected, expected_copies = again(targets), again(shadows)
    there = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in {"momentum": momentum, **settings}.items()
    }
    ema_update_(mine, others, shadows=copies or None, backend=backend, **there)
    ema_update_(
        expected, list(onlines), momentum, shadows=expected_copies or None,
        backend="reference", **settings,
    )  # fmt: skip
    assert_same_bits(mine, expected, "targets")
    assert_same_bits(copies, expected_copies, "shadows")
    assert_same_bits(others, before, "onlines")
