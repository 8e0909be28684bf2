"""Schema, fake, backends and autograd of the VICReg op; api.py has the public functions.

One forward op and one backward op serve every convention and both one and two views: conventions
are scalings (`conventions.py`), groups are a leading dimension, which [N, D] does without. With
m = min(N, D) and G = 1 for [N, D]:

    terms       float32 [4]            loss, invariance, variance, covariance
    moments     float32 [V, G, 3, D]   column mean as the sum of two floats (a large common offset
                                       costs no digits), column scatter (sum of squared deviations)
    squares     float32 [V, G, m, m]   N < D: the Gram matrix Zc Zc^T, else the scatter matrix
                                       Zc^T Zc with a zero diagonal
    deflated    float32 [V, G, K, N]   N < D: for the K columns of largest scatter, their covariance
                                       gradient before scaling, found without cancellation
    index       int64   [V, G, K]      which columns those are
    centred     [V, G, N, D]           the centred views where a backend's products need them stored
                                       (cuda); else empty

The covariance gradient before scaling is sum_{i != j} z_i (z_i . z_j) for column j. See
docs/vicreg.md for the formulas and docs/cancellation.md for the deflated columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels.core import calls, loader, schema
from vicreg_kernels.core.once import once
from vicreg_kernels.vicreg import contract
from vicreg_kernels.vicreg.contract import Kernels, Settings

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_SETTINGS = f"str backend, {schema.arguments(Settings)}"
_LIBRARY.define(
    f"vicreg_forward(Tensor x, Tensor? y, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "vicreg_backward(Tensor grads, Tensor x, Tensor? y, Tensor moments, Tensor squares,"
    f" Tensor deflated, Tensor index, Tensor centred, bool need_x, bool need_y, {_SETTINGS})"
    " -> (Tensor, Tensor)"
)


def _forward(x: Tensor, y: Tensor | None, backend: str, settings: Settings) -> tuple[Tensor, ...]:
    kernels = loader.load("vicreg", Kernels, backend)
    return kernels.forward(x, y, *settings.as_kernels_take(x.shape[-1]))


def _backward(
    grads: Tensor,
    x: Tensor,
    y: Tensor | None,
    saved: Sequence[Tensor],
    need_x: bool,
    need_y: bool,
    backend: str,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    kernels, taken = (
        loader.load("vicreg", Kernels, backend),
        settings.as_kernels_take(x.shape[-1]),
    )
    return kernels.backward(grads.contiguous(), x, y, *saved, need_x, need_y, *taken)


@torch.library.impl(_LIBRARY, "vicreg_forward", "CompositeExplicitAutograd")
def _forward_op(x: Tensor, y: Tensor | None, backend: str, *settings: Any) -> tuple[Tensor, ...]:
    return _forward(x, y, backend, Settings(*settings))


@torch.library.impl(_LIBRARY, "vicreg_backward", "CompositeExplicitAutograd")
def _backward_op(
    grads: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    squares: Tensor,
    deflated: Tensor,
    index: Tensor,
    centred: Tensor,
    need_x: bool,
    need_y: bool,
    backend: str,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    saved = (moments, squares, deflated, index, centred)
    return _backward(grads, x, y, saved, need_x, need_y, backend, Settings(*settings))


@torch.library.register_fake("vicreg_kernels::vicreg_forward")
def _forward_fake(x: Tensor, y: Tensor | None, backend: str, *settings: Any) -> tuple[Tensor, ...]:
    return contract.empty_saved(x, 1 if y is None else 2, backend)


@torch.library.register_fake("vicreg_kernels::vicreg_backward")
def _backward_fake(
    grads: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    squares: Tensor,
    deflated: Tensor,
    index: Tensor,
    centred: Tensor,
    need_x: bool,
    need_y: bool,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), x.new_empty(x.shape if need_y else (0,))


class VICReg(torch.autograd.Function):
    """Forward saves what the gradient needs; backward is one op call. Once differentiable."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, all_terms: bool, backend: str, settings: Settings
    ) -> Any:
        ctx.backend, ctx.settings = backend, settings
        if calls.direct(x, y):
            terms, *saved = _forward(x, y, backend, settings)
        else:
            terms, *saved = torch.ops.vicreg_kernels.vicreg_forward(x, y, backend, *settings)
        ctx.save_for_backward(x, y, *saved)
        return terms.unbind() if all_terms else terms[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, *saved = ctx.saved_tensors
        need_x, need_y, *_ = ctx.needs_input_grad
        grad = torch.stack(grads) if len(grads) > 1 else grads[0]
        args = (grad, x, y, saved, need_x, need_y, ctx.backend, ctx.settings)
        grad_x, grad_y = once("VICReg", _gradient, *args)
        return grad_x, grad_y, None, None, None


def _gradient(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    saved: list[Tensor],
    need_x: bool,
    need_y: bool,
    backend: str,
    settings: Settings,
) -> tuple[Tensor | None, Tensor | None]:
    if calls.direct(grad, x, y):
        grad_x, grad_y = _backward(grad, x, y, saved, need_x, need_y, backend, settings)
    else:
        grad_x, grad_y = torch.ops.vicreg_kernels.vicreg_backward(
            grad, x, y, *saved, need_x, need_y, backend, *settings
        )
    return grad_x if need_x else None, grad_y if need_y else None
