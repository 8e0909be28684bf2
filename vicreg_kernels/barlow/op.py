"""Schema, fake, backends, autograd, and the public function of the Barlow Twins op.

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

from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import calls, dispatch, distributed
from vicreg_kernels.barlow import backends, checks, ranks, reference
from vicreg_kernels.barlow.conventions import CONVENTIONS
from vicreg_kernels.vicreg.checks import check_precision

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_SETTINGS = "float eps, float std_eps, bool unbiased, float lambd, bool tf32x3, str backend"
_LIBRARY.define(
    f"barlow_forward(Tensor x, Tensor y, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "barlow_backward(Tensor grad, Tensor x, Tensor y, Tensor moments, Tensor diagonal,"
    f" Tensor products, Tensor standardised, bool need_x, bool need_y, {_SETTINGS})"
    " -> (Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "barlow_forward", "CompositeExplicitAutograd")
def _forward(x: Tensor, y: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    *rest, backend = settings
    return backends.load(backend).forward(x, y, *rest)


@torch.library.impl(_LIBRARY, "barlow_backward", "CompositeExplicitAutograd")
def _backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, backend = args
    return backends.load(backend).backward(grad.contiguous(), x, *rest)


@torch.library.register_fake("vicreg_kernels::barlow_forward")
def _forward_fake(x: Tensor, y: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    return backends.empty_saved(x, settings[-1])


@torch.library.register_fake("vicreg_kernels::barlow_backward")
def _backward_fake(grad: Tensor, x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_x, need_y = rest[4], rest[5]
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_y = x.new_empty(x.shape if need_y else (0,))
    return grad_x, grad_y


class _BarlowTwins(torch.autograd.Function):
    """Forward saves what the gradient needs; backward is one op call. Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, settings: tuple[Any, ...]) -> Tensor:
        run = _forward if calls.direct(x, y) else torch.ops.vicreg_kernels.barlow_forward
        loss, *saved = run(x, y, *settings)
        ctx.save_for_backward(x, y, *saved)
        ctx.settings = settings
        return loss[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, *saved = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[:2]
        args = (grad, x, y, saved, need_x, need_y, ctx.settings)
        run = _Gradient.apply if torch.is_grad_enabled() else _gradient
        grad_x, grad_y = run(*args)
        return grad_x if need_x else None, grad_y if need_y else None, None


def _gradient(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    saved: list[Tensor],
    need_x: bool,
    need_y: bool,
    settings: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    run = _backward if calls.direct(grad, x, y) else torch.ops.vicreg_kernels.barlow_backward
    return run(grad, x, y, *saved, need_x, need_y, *settings)


class _Gradient(torch.autograd.Function):
    """The backward op under create_graph=True: a second derivative is an error, not a silent 0.

    once_differentiable does not do: autograd.grad can walk past its error node.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        return _gradient(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "the fused Barlow Twins loss differentiates once; backend='reference' to any order"
        )


def _check(
    x: Tensor,
    y: Tensor,
    lambd: float | None,
    convention: str,
    eps: float | None,
    precision: str | None,
    backend: str | None,
    group: str | None,
) -> tuple[checks.Settings, str]:
    """The settings, and the backend that runs."""
    check_precision(precision, group)
    shape, dtype, device, layout = calls.seen("x", x)
    seen_y = calls.seen("y", y)
    numbers = (lambd, convention, eps, backend)
    settings = checks.two_views(shape, dtype, device, layout, *seen_y, *numbers, group is not None)
    if group is not None:
        return settings, distributed.choose_backend(backend, dtype)
    return settings, dispatch.choose("barlow", backend, device, dtype, min(shape))


def barlow_twins_loss(
    x: Tensor,
    y: Tensor,
    *,
    lambd: float | None = None,
    convention: str = "barlow_twins",
    eps: float | None = None,
    process_group: Any = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """The Barlow Twins loss of two views (Zbontar et al., 2021, arXiv:2103.03230).

    loss = sum_i (C_ii - 1)^2 + lambd sum_{i != j} C_ij^2, C = z1^T z2 / N, where z1 and z2 are the
    views standardised over the batch: as BatchNorm without affine does it, so that none is needed
    before the loss.

    Args:
        x, y: the two views' projections, [N, D], N >= 2; float32, bfloat16, float16 or float64, any
            strides.
        lambd: weight of the off-diagonal sum; None takes the convention's own, 0.0051 for
            "barlow_twins".
        convention: "barlow_twins", "lightly", "solo_learn", "stable_pretraining" or "monai": the
            published implementation whose value and gradient to reproduce (docs/barlow.md has the
            table).
        eps: added where the convention adds its own, to the variance under the root (the
            projections' unit squared) or to the standard deviation (their unit); None takes the
            convention's own.
        process_group: None, True (the default group) or a torch.distributed.ProcessGroup over whose
            ranks the batch is spread, each with its own rows, at least one. The loss is the whole
            batch's, the same on every rank; the gradient is `ranks` times the whole batch's at the
            own rows, so that DistributedDataParallel's mean is one process's gradient
            (docs/distributed.md). Every rank must call, and weigh the loss by the same factor.
        precision: of the products of float32 inputs. None: torch's setting on a GPU
            (torch.set_float32_matmul_precision), full float32 on a CPU. "tf32x3": on "cuda" and
            "triton" three tensor-core products of TF32 parts, whose error stays within float32's
            tolerances whatever torch's setting (docs/barlow.md); "cpu" computes in full float32,
            "reference" with torch's own products, either way. Half and float64 inputs are not
            touched. With a process_group: None.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the input. With a
            process_group of several ranks: "reference" or None.

    Returns:
        A 0-d tensor, float32 (float64 for float64 inputs). The gradient has the inputs' dtype.
        Fused backends differentiate once; "reference" to any order.

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting is not one of the above; the
            message names the argument.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    group = None if process_group is None else distributed.group_name(process_group)
    settings, name = distributed.checked(
        ranks.OP, group, _check, x, y, lambd, convention, eps, precision, backend, group
    )
    if not torch.compiler.is_compiling():
        dispatch.log_choice("barlow", name, backend, x.device, x.shape)
    if group is not None:
        loss = ranks.loss(x, y, *settings, name, convention, group)
    elif name == "reference":
        loss = reference.loss(x, y, *settings)
    else:
        loss = _BarlowTwins.apply(x, y, (*settings, precision == "tf32x3", name))
    scale = CONVENTIONS[convention].scale
    return loss if scale == 1.0 else loss * scale
