"""Schemas, fakes, backends and autograd of adaptive layer norm; api.py has the public functions.

Forward of the norm: one pass over the tokens; saved are a mean and a rstd a token, and x and scale
themselves. Backward: x and the incoming gradient, one pass, into the gradients of x, shift and
scale. The gate saves y and gate; the gradient of x is the incoming one as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vicreg_kernels.adaln.contract import Kernels, Settings
from vicreg_kernels.core import calls, loader, schema
from vicreg_kernels.core.once import once

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_LIBRARY.define(
    "adaln_norm_forward(Tensor x, Tensor shift, Tensor scale, str backend,"
    f" {schema.arguments(Settings)}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "adaln_norm_backward(Tensor grad, Tensor x, Tensor scale, Tensor saved, bool need_x,"
    " bool need_vectors, str backend) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("adaln_gate_forward(Tensor x, Tensor y, Tensor gate, str backend) -> Tensor")
_LIBRARY.define(
    "adaln_gate_backward(Tensor grad, Tensor y, Tensor gate, bool need_y, bool need_gate,"
    " str backend) -> (Tensor, Tensor)"
)


def _norm_forward(
    x: Tensor, shift: Tensor, scale: Tensor, backend: str, *settings: Any
) -> tuple[Tensor, Tensor]:
    return loader.load("adaln", Kernels, backend).norm_forward(x, shift, scale, *settings)


def _norm_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    saved: Tensor,
    need_x: bool,
    need_vectors: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = loader.load("adaln", Kernels, backend)
    return kernels.norm_backward(grad, x, scale, saved, need_x, need_vectors)


def _gate_forward(x: Tensor, y: Tensor, gate: Tensor, backend: str) -> Tensor:
    return loader.load("adaln", Kernels, backend).gate_forward(x, y, gate)


def _gate_backward(
    grad: Tensor, y: Tensor, gate: Tensor, need_y: bool, need_gate: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return loader.load("adaln", Kernels, backend).gate_backward(grad, y, gate, need_y, need_gate)


torch.library.impl(_LIBRARY, "adaln_norm_forward", "CompositeExplicitAutograd")(_norm_forward)
torch.library.impl(_LIBRARY, "adaln_norm_backward", "CompositeExplicitAutograd")(_norm_backward)
torch.library.impl(_LIBRARY, "adaln_gate_forward", "CompositeExplicitAutograd")(_gate_forward)
torch.library.impl(_LIBRARY, "adaln_gate_backward", "CompositeExplicitAutograd")(_gate_backward)


def _like(z: Tensor, needed: bool = True) -> Tensor:
    return z.new_empty(z.shape if needed else (0,))


@torch.library.register_fake("vicreg_kernels::adaln_norm_forward")
def _norm_forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty((*x.shape[:2], 2), dtype=torch.float32)


@torch.library.register_fake("vicreg_kernels::adaln_norm_backward")
def _norm_backward_fake(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    saved: Tensor,
    need_x: bool,
    need_vectors: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x, need_x), _like(scale, need_vectors), _like(scale, need_vectors)


@torch.library.register_fake("vicreg_kernels::adaln_gate_forward")
def _gate_forward_fake(x: Tensor, *rest: Any) -> Tensor:
    return _like(x)


@torch.library.register_fake("vicreg_kernels::adaln_gate_backward")
def _gate_backward_fake(
    grad: Tensor, y: Tensor, gate: Tensor, need_y: bool, need_gate: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return _like(y, need_y), _like(gate, need_gate)


class Norm(torch.autograd.Function):
    """x [G, T, D], shift, scale [G, D], backend, settings -> [G, T, D]. Once differentiable."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, backend: str, settings: Settings
    ) -> Tensor:
        direct = calls.direct(x, shift, scale)
        run = _norm_forward if direct else torch.ops.vicreg_kernels.adaln_norm_forward
        out, saved = run(x, shift, scale, backend, *settings)
        ctx.save_for_backward(x, scale, saved)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        need_x, need_shift, need_scale, *_ = ctx.needs_input_grad
        args = (grad, *ctx.saved_tensors, need_x, need_shift or need_scale, ctx.backend)
        gradients = once("modulated layer norm", _norm_gradient, *args)
        needs = (need_x, need_shift, need_scale)
        return *(z if need else None for z, need in zip(gradients, needs, strict=True)), None, None


def _norm_gradient(
    grad: Tensor, x: Tensor, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    direct = calls.direct(grad, x, scale)
    run = _norm_backward if direct else torch.ops.vicreg_kernels.adaln_norm_backward
    return run(grad, x, scale, *rest)


class Gate(torch.autograd.Function):
    """x, y [G, T, D], gate [G, D], backend -> [G, T, D]. Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, backend: str) -> Tensor:
        direct = calls.direct(x, y, gate)
        run = _gate_forward if direct else torch.ops.vicreg_kernels.adaln_gate_forward
        ctx.save_for_backward(y, gate)
        ctx.backend = backend
        return run(x, y, gate, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        need_x, need_y, need_gate, _ = ctx.needs_input_grad
        grad_y = grad_gate = None
        if need_y or need_gate:
            args = (grad, *ctx.saved_tensors, need_y, need_gate, ctx.backend)
            grad_y, grad_gate = once("gated residual", _gate_gradient, *args)
        return (
            grad if need_x else None,
            grad_y if need_y else None,
            grad_gate if need_gate else None,
            None,
        )


def _gate_gradient(grad: Tensor, y: Tensor, gate: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    direct = calls.direct(grad, y, gate)
    run = _gate_backward if direct else torch.ops.vicreg_kernels.adaln_gate_backward
    return run(grad, y, gate, *rest)
