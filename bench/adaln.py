"""Adaptive layer norm against what published predictors write.

A step is the forward and the backward with the gradients of tokens and vectors. Contenders:

    eager      a layer norm without affine, (1 + scale) and shift broadcast over the frame's tokens
    repeated   the same with the vectors repeated for every token, as a published predictor does
    compiled   torch.compile of eager
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from bench.case import Case, Plan, Step
from vicreg_kernels.adaln import contract, gated_residual, modulated_layer_norm
from vicreg_kernels.core import dispatch

TITLE = "Adaptive layer norm, forward and backward, by samples x frames x tokens x dim"
CONTENDERS = {
    "eager": "layer norm and broadcasting",
    "repeated": "vectors repeated a token",
    "compiled": "eager, torch.compile",
}
EPS = 1e-6


def eager_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x, (x.shape[-1],), eps=EPS)
    return normed * (1 + scale[..., None, :]) + shift[..., None, :]


def eager_gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[..., None, :] * y


def _repeated(z: Tensor, like: Tensor) -> Tensor:
    tokens = like.shape[-2]
    return z.flatten(0, -2).repeat_interleave(tokens, dim=0).view(like.shape)


def repeated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x, (x.shape[-1],), eps=EPS)
    return normed * (1 + _repeated(scale, x)) + _repeated(shift, x)


def repeated_gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + _repeated(gate, x) * y


def _case(kind: str, *shape: int, quick: bool = False) -> Case:
    norm = kind == "norm"

    def build(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
        def leaf(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=device).to(dtype).requires_grad_()

        vectors = [leaf(*shape[:-2], shape[-1]) for _ in range(2 if norm else 1)]
        leaves = [leaf(*shape), *(() if norm else (leaf(*shape),)), *vectors]
        grad = torch.randn(shape, device=device).to(dtype)

        def ours(*z: Tensor) -> Tensor:
            return (modulated_layer_norm if norm else gated_residual)(*z, backend=backend)

        eager = eager_norm if norm else eager_gate
        functions: dict[str, Callable[..., Any]] = {
            "ours": ours,
            "eager": eager,
            "repeated": repeated_norm if norm else repeated_gate,
            "compiled": measure.compiled(eager),
        }

        def step(function: Callable[..., Any]) -> Step:
            return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

        op, cannot_run = "gated_residual", {}
        if norm:
            op, cannot_run = "adaln", contract.cannot_run(shape[-1])
        return Plan(
            steps={name: step(function) for name, function in functions.items()},
            backend=dispatch.choose(op, backend, device.type, dtype, cannot_run=cannot_run),
            # read x, write out; read x and grad, write its gradient; the gate reads y as well, and
            # its backward y and grad
            least_bytes=(5 if norm else 6) * grad.nbytes,
            least_operations=(21 if norm else 5) * grad.numel(),
            compiled=("compiled",),
        )

    return Case(
        f"{kind}_{'x'.join(map(str, shape))}",
        build,
        targets={"cpu": {"eager": 2.0} if norm else {}, "cuda": {}},
        dtypes={"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)},
        quick=quick,
        floor=1.5,
    )


# The frames of a video predictor, DiT-XL/2's images, and one token a frame, as of a latent world
# model.
CASES = {
    case.name: case
    for case in (
        _case("norm", 8, 16, 196, 384, quick=True),
        _case("gate", 8, 16, 196, 384),
        _case("norm", 16, 256, 1152),
        _case("gate", 16, 256, 1152),
        _case("norm", 128, 16, 1, 192),
        _case("gate", 128, 16, 1, 192),
    )
}


def exercise(backend: str, device: str) -> int:
    """Both ops with widths of both alignments, vectors of frames and of tokens."""
    bad, where = 0, torch.device(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for dim in (24, 33, 520):
            for each in (False, True):
                shape = (2, 3, 5, dim)
                x, y = (torch.randn(shape, device=where).to(dtype) for _ in "xy")
                sizes = shape if each else (2, 3, dim)
                vectors = [torch.randn(sizes, device=where).to(dtype) for _ in range(3)]
                leaves = [z.requires_grad_() for z in (x, y, *vectors)]
                normed = modulated_layer_norm(x, *vectors[:2], backend=backend)
                out = gated_residual(normed, y, vectors[2], backend=backend)
                results = [out, *torch.autograd.grad(out.float().square().sum(), leaves)]
                bad += sum(not result.isfinite().all().item() for result in results)
    return bad
