"""Schema, fake, backends and autograd of the Barlow Twins op; api.py has the public function.

One forward op and one backward op serve every convention (`conventions.py`): a view is standardised
as z = (x - mean) / (sqrt(scatter / degrees + eps) + std_eps), degrees = N or N - 1. The forward op
returns

    loss          float32 [1]
    moments       float32 [2, 3, D]  a view: column mean as the sum of two floats (a large common
                                     offset costs no digits), column scatter (sum of squared
                                     deviations)
    diagonal      float32 [D]        C_jj, C = Z1^T Z2 / N
    products      float32            N < D: [2, N, N], the Gram matrices Z1 Z1^T and Z2 Z2^T;
                                     else [1, D, D], C with a zero diagonal
    standardised  [2, N, D]          Z1 and Z2 in the inputs' dtype where a backend's products need
                                     them stored (cuda); else empty

See docs/barlow.md for the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels.barlow import contract
from vicreg_kernels.barlow.contract import Kernels, Settings
from vicreg_kernels.core import calls, loader, schema
from vicreg_kernels.core.once import once

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_SETTINGS = f"str backend, {schema.arguments(Settings)}"
_LIBRARY.define(
    f"barlow_forward(Tensor x, Tensor y, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "barlow_backward(Tensor grad, Tensor x, Tensor y, Tensor moments, Tensor diagonal,"
    f" Tensor products, Tensor standardised, bool need_x, bool need_y, {_SETTINGS})"
    " -> (Tensor, Tensor)"
)


def _forward(x: Tensor, y: Tensor, backend: str, settings: Sequence[Any]) -> tuple[Tensor, ...]:
    return loader.load("barlow", Kernels, backend).forward(x, y, *settings)


def _backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    saved: Sequence[Tensor],
    need_x: bool,
    need_y: bool,
    backend: str,
    settings: Sequence[Any],
) -> tuple[Tensor, Tensor]:
    kernels = loader.load("barlow", Kernels, backend)
    return kernels.backward(grad.contiguous(), x, y, *saved, need_x, need_y, *settings)


@torch.library.impl(_LIBRARY, "barlow_forward", "CompositeExplicitAutograd")
def _forward_op(x: Tensor, y: Tensor, backend: str, *settings: Any) -> tuple[Tensor, ...]:
    return _forward(x, y, backend, settings)


@torch.library.impl(_LIBRARY, "barlow_backward", "CompositeExplicitAutograd")
def _backward_op(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    moments: Tensor,
    diagonal: Tensor,
    products: Tensor,
    standardised: Tensor,
    need_x: bool,
    need_y: bool,
    backend: str,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    saved = (moments, diagonal, products, standardised)
    return _backward(grad, x, y, saved, need_x, need_y, backend, settings)


@torch.library.register_fake("vicreg_kernels::barlow_forward")
def _forward_fake(x: Tensor, y: Tensor, backend: str, *settings: Any) -> tuple[Tensor, ...]:
    return contract.empty_saved(x, backend)


@torch.library.register_fake("vicreg_kernels::barlow_backward")
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    moments: Tensor,
    diagonal: Tensor,
    products: Tensor,
    standardised: Tensor,
    need_x: bool,
    need_y: bool,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), x.new_empty(x.shape if need_y else (0,))


class BarlowTwins(torch.autograd.Function):
    """Forward saves what the gradient needs; backward is one op call. Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, backend: str, settings: Settings) -> Tensor:
        if calls.direct(x, y):
            loss, *saved = _forward(x, y, backend, settings)
        else:
            loss, *saved = torch.ops.vicreg_kernels.barlow_forward(x, y, backend, *settings)
        ctx.save_for_backward(x, y, *saved)
        ctx.backend, ctx.settings = backend, settings
        return loss[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, *saved = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[:2]
        args = (grad, x, y, saved, need_x, need_y, ctx.backend, ctx.settings)
        grad_x, grad_y = once("Barlow Twins loss", _gradient, *args)
        return grad_x if need_x else None, grad_y if need_y else None, None, None


def _gradient(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    saved: list[Tensor],
    need_x: bool,
    need_y: bool,
    backend: str,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    if calls.direct(grad, x, y):
        return _backward(grad, x, y, saved, need_x, need_y, backend, settings)
    op = torch.ops.vicreg_kernels.barlow_backward
    return op(grad, x, y, *saved, need_x, need_y, backend, *settings)
