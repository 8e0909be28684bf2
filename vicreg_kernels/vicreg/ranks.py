"""The VICReg op on a batch that several ranks hold: each works on its own rows.

Plain torch products on every device: a rank's share is a rectangular product, a vendor GEMM's
home. With n rows here of N in all, V views of G groups and R ranks, a rank does

                            exchanges                               operations
    statistics              2 V G D + 1 float64, summed             7 V G n D
    N < D:   rows           V G n D of the input's dtype, gathered  2 V G n N D
             squares        1 float64, summed (half: + V G D)       2 V G n N D for the gradient
    N >= D:  covariance     V G D (D + step) / 2 float32, summed    V G n D (D + step)
                                                                    2 V G n D^2 for the gradient

Products run while the next view's rows, or the next chunk of the covariance, are on their way.

The forward multiplies for the gradient as well, where one is needed: what is saved is then own
rows, [V, G, n, D], where the gradient's product would need everyone's rows or a D x D matrix; every
size follows from this rank's input, which a compiled graph wants; and the backward exchanges
nothing and multiplies nothing. The gradient's projection by the centring needs no sum over ranks
either: columns of K Zc and of Zc times anything sum to 1^T Zc (...) = 0 over the whole batch.

    moments     float32 [V, G, 3, D]    as in op.py, of the whole batch
    count       float64 [1]             N
    gradients   float32 [G, n, D] each  a view's covariance gradient before scaling

docs/distributed.md has the reasons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.core import dispatch, library, schema
from vicreg_kernels.core.once import once
from vicreg_kernels.distributed.batch_statistics import statistics, two_floats
from vicreg_kernels.vicreg import ranks_squares, reference
from vicreg_kernels.vicreg.contract import Settings
from vicreg_kernels.vicreg.ranks_squares import OP

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_SETTINGS = f"str group, {schema.arguments(Settings)}"
_LIBRARY.define(
    "vicreg_ranks_forward(Tensor x, Tensor? y, bool need_x, bool need_y,"
    f" {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "vicreg_ranks_backward(Tensor grads, Tensor x, Tensor? y, Tensor moments, Tensor count,"
    " Tensor gradient_x, Tensor gradient_y, bool need_x, bool need_y,"
    f" {_SETTINGS}) -> (Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "vicreg_ranks_forward", "CompositeExplicitAutograd")
def _forward(
    x: Tensor, y: Tensor | None, need_x: bool, need_y: bool, group: str, *settings: Any
) -> tuple[Tensor, ...]:
    with library.no_autocast(x.device):
        return forward(x, y, need_x, need_y, group, Settings(*settings))


@torch.library.impl(_LIBRARY, "vicreg_ranks_backward", "CompositeExplicitAutograd")
def _backward(
    grads: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    count: Tensor,
    gradient_x: Tensor,
    gradient_y: Tensor,
    need_x: bool,
    need_y: bool,
    group: str,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    gradients = (gradient_x if need_x else None, gradient_y if need_y else None)
    with library.no_autocast(x.device):
        return backward(grads, x, y, moments, count, gradients, group, Settings(*settings))


@torch.library.register_fake("vicreg_kernels::vicreg_ranks_forward")
def _forward_fake(
    x: Tensor, y: Tensor | None, need_x: bool, need_y: bool, *settings: Any
) -> tuple[Tensor, ...]:
    groups, _, dim = x.shape
    views = 1 if y is None else 2
    return (
        x.new_empty(4, dtype=torch.float32),
        x.new_empty((views, groups, 3, dim), dtype=torch.float32),
        x.new_empty(1, dtype=torch.float64),
        x.new_empty(x.shape if need_x else (0,), dtype=torch.float32),
        x.new_empty(x.shape if need_y else (0,), dtype=torch.float32),
    )


@torch.library.register_fake("vicreg_kernels::vicreg_ranks_backward")
def _backward_fake(
    grads: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    count: Tensor,
    gradient_x: Tensor,
    gradient_y: Tensor,
    need_x: bool,
    need_y: bool,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), x.new_empty(x.shape if need_y else (0,))


class _Ranks(torch.autograd.Function):
    """Forward saves what the gradient needs; backward is one op call. Once differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        need_x: bool,
        need_y: bool,
        all_terms: bool,
        group: str,
        settings: Settings,
    ) -> Any:
        terms, *saved = torch.ops.vicreg_kernels.vicreg_ranks_forward(
            x, y, need_x, need_y, group, *settings
        )
        ctx.save_for_backward(x, y, *saved)
        ctx.group, ctx.settings = group, settings
        return tuple(terms.unbind()) if all_terms else terms[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, *saved = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[:2]
        grad = torch.stack(grads) if len(grads) > 1 else grads[0].reshape(1)
        args = (grad, x, y, saved, need_x, need_y, ctx.group, ctx.settings)
        grad_x, grad_y = once("VICReg", _gradient, *args)
        return (grad_x if need_x else None, grad_y if need_y else None, *(None,) * 5)


def _gradient(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    saved: list[Tensor],
    need_x: bool,
    need_y: bool,
    group: str,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    op = torch.ops.vicreg_kernels.vicreg_ranks_backward
    return op(grad, x, y, *saved, need_x, need_y, group, *settings)


def terms(
    x: Tensor,
    y: Tensor | None,
    settings: Settings,
    backend: str,
    group: str,
    all_terms: bool,
) -> Any:
    """The whole batch's loss, or its four terms; x, y: own rows [G, n, D]."""
    if backend == "ranks":
        enabled = torch.is_grad_enabled()
        need_x = enabled and x.requires_grad
        need_y = enabled and y is not None and y.requires_grad
        return _Ranks.apply(x, y, need_x, need_y, all_terms, group, settings)
    rows = agree(x, y, settings, "reference", group)
    views = [
        distributed.gather_differentiable(OP, group, z.transpose(0, 1), rows).transpose(0, 1)
        for z in (x, y)
        if z is not None
    ]
    other = views[1] if len(views) > 1 else None
    terms = reference.terms(views[0], other, *settings.as_reference_takes(x.shape[-1]))
    return terms if all_terms else terms[0]


def agree(x: Tensor, y: Tensor | None, settings: Settings, backend: str, group: str) -> list[int]:
    """Rows of each rank; all ranks raise where one cannot or would do something else."""
    groups, rows, dim = x.shape
    facts = {
        "views": 1 if y is None else 2,
        "D": dim,
        "groups or positions": groups,
        "dtype": x.dtype,
        "margin": settings.margin,
        "eps": settings.eps,
        "unbiased": settings.unbiased,
        "scales of the convention": tuple(settings.scales),
        "weights (invariance, variance, covariance)": tuple(settings.weights),
        "covariance normalizer": settings.normalizer,
        "backend": backend,
    }
    return distributed.agree(distributed.by_name(group), OP, rows, facts)


def forward(
    x: Tensor, y: Tensor | None, need_x: bool, need_y: bool, group: str, settings: Settings
) -> tuple[Tensor, ...]:
    """terms, float32 [4], then moments, count and the gradients of x and y as above."""
    margin, eps, unbiased, scales, weights = settings.as_reference_takes(x.shape[-1])
    rows = agree(x, y, settings, "ranks", group)
    ranks = distributed.by_name(group)
    total, (groups, _, dim) = sum(rows), x.shape
    degrees = total - int(unbiased)
    own, mean, scatter, difference = statistics(OP, x, y, rows, ranks)
    side = ranks_squares.gram if total < dim else ranks_squares.covariance
    square, scatter, gradients = side(own, scatter, x.dtype, (need_x, need_y), rows, ranks)
    high, low = two_floats(mean)
    moments = torch.stack((high, low, scatter.float()), dim=2)
    if y is None:
        gradients.append(own.new_empty(0))

    std = torch.sqrt(scatter / degrees + eps)
    invariance = scales[0] * difference / (total * groups * dim)
    variance = scales[1] * torch.relu(margin - std).mean(dim=(1, 2)).sum()
    scale = scales[2] / (groups * degrees * degrees)
    covariance = scale * square
    loss = weights[0] * invariance + weights[1] * variance + weights[2] * covariance
    terms = torch.stack((loss, invariance, variance, covariance)).float()
    return terms, moments, mean.new_full((1,), total), *gradients


def backward(
    grads: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    count: Tensor,
    gradients: tuple[Tensor | None, Tensor | None],
    group: str,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """`ranks` times the whole batch's gradient at x and y, contiguous, empty where `gradients`, the
    views' covariance gradients, has None. grads: float32 [1] (loss) or [4] (loss and terms), the
    same on every rank.
    """
    margin, eps, unbiased, scales, weights = settings.as_reference_takes(x.shape[-1])
    process_group = distributed.by_name(group)
    if dispatch.DEBUG:
        distributed.check_same(OP, process_group, "the loss's incoming gradient", grads)
    groups, _, dim = x.shape
    ranks = torch.distributed.get_world_size(process_group)
    degrees = (count - int(unbiased)).float()
    each = [
        (grads[0] * weight + (grads[i + 1] if len(grads) > 1 else 0.0)) * (scale * ranks)
        for i, (weight, scale) in enumerate(zip(weights, scales, strict=True))
    ]
    a_invariance = each[0] * 2.0 / (count.float() * groups * dim)
    a_variance = each[1] / (groups * dim)
    a_covariance = each[2] * 4.0 / (groups * degrees * degrees)
    difference = None if y is None else (x.float() - y.float()).mul_(a_invariance)
    std = torch.sqrt(moments[:, :, 2] / degrees + eps)
    slope = torch.where(std >= margin, 0.0, -a_variance / (degrees * std))  # [V, G, D]

    results = [x.new_empty(0), x.new_empty(0)]
    for v, (z, gradient) in enumerate(zip((x, y), gradients, strict=True)):
        if z is None or gradient is None:
            continue
        high, low, _ = moments[v].unsqueeze(2).unbind(1)  # [G, 1, D]
        out = torch.sub(z, high, out=z.new_empty(z.shape, dtype=torch.float32)).sub_(low)
        out.mul_(slope[v].unsqueeze(1)).addcmul_(gradient, a_covariance)
        if difference is not None:
            out.add_(difference, alpha=1 - 2 * v)
        results[v] = out.to(z.dtype)
    return results[0], results[1]
