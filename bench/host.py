"""What a call costs the host: every public op on inputs so small that no kernel takes any time.

At the sizes people train with, most ops are over in tens of microseconds on a GPU, so the Python
and the dispatch around them show. A step is a forward and a backward, or one EMA update. The time
is the host's: on a GPU the clock stops when the call returns, not when the device is done. Rows are
in milliseconds, as all others: 0.07 is 70 us. `compiled` is ours under torch.compile; the second
row of a case on a GPU replays its CUDA graph, where nothing of the host's share is left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import barlow_baselines, sigreg_baselines, tokens, vicreg_baselines, vicregl
from bench import ema as ema_op
from bench.attention import angles, rotate_eagerly
from bench.case import Case, Plan, Step
from bench.measure import compiled
from bench.vicregl_baselines import eager as vicregl_eager
from vicreg_kernels.attention import Ragged, Rope3d, masked_attention
from vicreg_kernels.barlow import barlow_twins_loss
from vicreg_kernels.core import dispatch
from vicreg_kernels.ema import EMA, ema_update_
from vicreg_kernels.sigreg import sigreg_loss
from vicreg_kernels.tokens import assemble_tokens, gather_tokens, prediction_loss
from vicreg_kernels.vicreg import vicreg_loss
from vicreg_kernels.vicregl import vicregl_loss

TITLE = "The host's share of a call: forward and backward of tiny inputs, by op"
CONTENDERS = {
    "eager": "the formula in plain PyTorch",
    "sdpa": "SDPA",
    "foreach_lerp": "_foreach_lerp_",
    "bare": "a bare autograd.Function",
    "compiled": "ours, torch.compile",
    "compiled_sum": "a sum, torch.compile",
}
# The most that ours may take: 70 us for a loss, 1.5x SDPA, 1.3x _foreach_lerp_.
LOSS_MS = 0.07
LEAST_OF_SDPA = 0.667
LEAST_OF_LERP = 0.77
ROWS, DIM = 8, 16
MOMENTUM = 0.996


class Bare(torch.autograd.Function):
    """Computes nothing: what torch itself takes for a Function in Python of these inputs, below
    which no op of this library comes.
    """

    @staticmethod
    def forward(ctx: Any, like: Tensor, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*leaves)
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *ctx.saved_tensors


def plan(
    name: str,
    backend: str | None,
    function: Callable[..., Tensor],
    others: dict[str, Callable[..., Tensor]],
    *leaves: Tensor,
) -> Plan:
    """function: ours, from leaves to a result whose gradients are taken, as are the others'."""
    grad = torch.ones_like(function(*leaves))
    functions: dict[str, Callable[..., Any]] = {"ours": function, **others}
    functions |= {"bare": partial(Bare.apply, grad), "compiled": compiled(function)}

    def step(run: Callable[..., Tensor]) -> Step:
        return lambda: torch.autograd.grad(run(*leaves), leaves, grad)

    steps = {key: step(run) for key, run in functions.items()}
    entry = compiled(lambda *z: sum(x.sum() for x in z))
    steps["compiled_sum"] = lambda: torch.autograd.grad(entry(*leaves), leaves)
    chosen = dispatch.choose(name, backend, leaves[0].device.type, leaves[0].dtype)
    return Plan(steps, chosen, 0, 0, compiled=("compiled", "compiled_sum"), host=True)


def draw(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def vicreg_plan(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    views = draw(device, dtype, (ROWS, DIM), (ROWS, DIM))
    ours = partial(vicreg_loss, backend=backend)
    return plan("vicreg", backend, ours, {"eager": vicreg_baselines.eager}, *views)


def barlow_plan(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    views = draw(device, dtype, (ROWS, DIM), (ROWS, DIM))
    ours = partial(barlow_twins_loss, backend=backend)
    return plan("barlow", backend, ours, {"eager": barlow_baselines.eager}, *views)


def sigreg_plan(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    slices, knots = 16, 17
    (z,) = draw(device, dtype, (ROWS, DIM))
    eager = sigreg_baselines.eager_loss(slices, knots, device)
    step = torch.zeros((), dtype=torch.int64, device=device)

    def ours(z: Tensor) -> Tensor:
        return sigreg_loss(z, slices=slices, knots=knots, step=step, backend=backend)

    def half_eager(z: Tensor) -> Tensor:
        return eager(z.float())

    return plan("sigreg", backend, ours, {"eager": half_eager}, z)


def vicregl_plan(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    shape = vicregl.Shape(ROWS, (5, 5), DIM, DIM)
    embeddings, maps, grids = vicregl.draw(shape, device, dtype)
    views = len(maps)

    def ours(*z: Tensor) -> Tensor:
        return vicregl_loss(z[:views], z[views:], grids, backend=backend)

    def eager(*z: Tensor) -> Tensor:
        wide = [x.float() for x in z]  # cdist takes no halves
        return vicregl_eager(wide[:views], wide[views:], grids)

    return plan("vicregl", backend, ours, {"eager": eager}, *embeddings, *maps)


HEADS, LENGTH, HEAD_DIM = 2, 8, 32


def attention_plan(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    leaves = draw(device, dtype, *[(2, HEADS, LENGTH, HEAD_DIM)] * 3)
    ours = partial(masked_attention, backend=backend)
    return plan("attention", backend, ours, {"sdpa": F.scaled_dot_product_attention}, *leaves)


def ragged_plan(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    """Two samples of one length, so that SDPA does the same without a mask."""
    leaves = draw(device, dtype, *[(2 * LENGTH, HEADS, HEAD_DIM)] * 3)
    offsets = torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32, device=device)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = Ragged(offsets, max_length=LENGTH)
        return masked_attention(q, k, v, mask=mask, backend=backend)

    def sdpa(*packed: Tensor) -> Tensor:
        rows = [x.unflatten(0, (2, LENGTH)).transpose(1, 2) for x in packed]
        return F.scaled_dot_product_attention(*rows).transpose(1, 2).flatten(0, 1)

    return plan("attention", backend, ours, {"sdpa": sdpa}, *leaves)


def rope_plan(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    leaves = draw(device, dtype, *[(2, HEADS, LENGTH, HEAD_DIM)] * 3)
    grid = (2, 2, 2)
    places = torch.arange(LENGTH, device=device).expand(2, LENGTH)
    cosine, sine = angles(Rope3d(grid, places[0]), places[0], HEAD_DIM, leaves[0])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, rope=Rope3d(grid, places), backend=backend)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (rotate_eagerly(x, cosine, sine) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v)

    return plan("attention", backend, ours, {"sdpa": sdpa}, *leaves)


def prediction_plan(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    teacher = torch.randn(2, LENGTH, DIM, device=device).to(dtype)
    index = tokens.masks(2, LENGTH, 4, device)
    leaves = draw(device, dtype, (2, 4, DIM))

    def ours(pred: Tensor) -> Tensor:
        return prediction_loss(pred, teacher, index, backend=backend)

    eager = tokens.plain_loss(teacher, [index], "smooth_l1")
    return plan("tokens", backend, ours, {"eager": eager}, *leaves)


def gather_plan(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    index = tokens.masks(2, LENGTH, 4, device)
    leaves = draw(device, dtype, (2, LENGTH, DIM))

    def ours(x: Tensor) -> Tensor:
        return gather_tokens(x, index, backend=backend)

    return plan(
        "tokens", backend, ours, {"eager": lambda x: tokens.indexed_gather(x, index)}, *leaves
    )


def assemble_plan(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    both = torch.stack([torch.randperm(LENGTH) for _ in range(2)]).to(device)
    context_index, target_index = both[:, :5].sort(dim=1).values, both[:, 5:].sort(dim=1).values
    leaves = draw(device, dtype, (2, 5, DIM), (DIM,))

    def ours(context: Tensor, mask_token: Tensor) -> Tensor:
        return assemble_tokens(
            context, context_index, mask_token, target_index, backend=backend
        ).tokens

    def eager(context: Tensor, mask_token: Tensor) -> Tensor:
        return tokens.plain_assembly(context, context_index, mask_token, target_index)

    return plan("tokens", backend, ours, {"eager": eager}, *leaves)


# --------------------------------------------------------------------------------------------- EMA


class _Block(nn.Module):
    """As timm's, with the parts that hold no tensor: a walk over the modules meets them too."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.ModuleDict(
            {
                "qkv": nn.Linear(width, 3 * width),
                "q_norm": nn.Identity(),
                "k_norm": nn.Identity(),
                "attn_drop": nn.Dropout(),
                "proj": nn.Linear(width, width),
                "proj_drop": nn.Dropout(),
            }
        )
        self.ls1, self.drop_path1 = nn.Identity(), nn.Identity()
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(width, hidden),
                "act": nn.GELU(),
                "drop1": nn.Dropout(),
                "norm": nn.Identity(),
                "fc2": nn.Linear(hidden, width),
                "drop2": nn.Dropout(),
            }
        )
        self.ls2, self.drop_path2 = nn.Identity(), nn.Identity()


class TinyVision(nn.Module):
    """The tensors of a vision transformer by name and number, of a few elements each."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 2))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, 2, 2), "norm": nn.Identity()})
        self.blocks = nn.ModuleList(_Block(2, 4) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(2), nn.Identity()


def ema_plan(
    depth: int, module: bool, device: torch.device, dtype: torch.dtype, backend: str | None
) -> Plan:
    """module: EMA.update, which finds the tensors of two models; else ema_update_ of two lists."""
    student = TinyVision(depth).to(device, dtype)
    ema = EMA(
        student, MOMENTUM, schedule="linear", total_steps=1 << 40, dtype=None, backend=backend
    )
    # _foreach_lerp_ works on tensors of its own
    targets, onlines, teachers, students = (
        [p.detach().clone() for p in student.parameters()] for _ in range(4)
    )
    lerp = partial(ema_op.foreach_lerp, teachers, students)
    ours: Callable[..., Any] = partial(ema.update, student)
    if not module:
        ours = partial(ema_update_, targets, onlines, MOMENTUM, backend=backend)
    return Plan(
        {"ours": ours, "foreach_lerp": lerp, "compiled": compiled(ours)},
        dispatch.choose("ema_update_", backend, device.type, dtype),
        0,
        0,
        compiled=("compiled",),
        host=True,
    )


def _loss(name: str, build: Callable[..., Plan]) -> Case:
    return Case(name, build, {}, quick=name == "vicreg_loss", most_ms=LOSS_MS)


def _attention(name: str, build: Callable[..., Plan]) -> Case:
    least = {"sdpa": LEAST_OF_SDPA}
    return Case(name, build, {"cpu": least, "cuda": least}, quick=build is attention_plan)


def _ema(name: str, model: str, module: bool) -> Case:
    least = {"foreach_lerp": LEAST_OF_LERP}
    return Case(
        f"{name}_{model}",
        partial(ema_plan, ema_op.MODELS[model][1], module),
        {"cpu": least, "cuda": least},
        {"cpu": ("float32",), "cuda": ("float32",)},
        quick=model == "vit_b",
    )


CASES = {
    case.name: case
    for case in (
        _loss("vicreg_loss", vicreg_plan),
        _attention("masked_attention", attention_plan),
        _ema("ema_update_", "vit_b", module=False),
        _ema("EMA.update", "vit_b", module=True),
        _loss("sigreg_loss", sigreg_plan),
        _loss("barlow_twins_loss", barlow_plan),
        _loss("prediction_loss", prediction_plan),
        # a composition of some dozen ops, so that 70 us are out of reach
        Case("vicregl_loss", vicregl_plan, {}),
        _attention("masked_attention_ragged", ragged_plan),
        _attention("masked_attention_rope", rope_plan),
        _ema("ema_update_", "vit_l", module=False),
        _ema("EMA.update", "vit_l", module=True),
        Case("gather_tokens", gather_plan, {}),
        Case("assemble_tokens", assemble_plan, {}),
    )
}
