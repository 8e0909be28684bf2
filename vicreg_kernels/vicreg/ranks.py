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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import dispatch, distributed, library
from vicreg_kernels.shares import statistics, two_floats
from vicreg_kernels.vicreg import ranks_squares, reference
from vicreg_kernels.vicreg.conventions import covariance_scale
from vicreg_kernels.vicreg.ranks_squares import OP

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_SETTINGS = (
    "float margin, float eps, bool unbiased, float[] scales, float[] weights, str normalizer,"
    " str group"
)
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
def _forward(x: Tensor, y: Tensor | None, *settings: Any) -> tuple[Tensor, ...]:
    with library.no_autocast(x.device):
        return forward(x, y, *settings)


@torch.library.impl(_LIBRARY, "vicreg_ranks_backward", "CompositeExplicitAutograd")
def _backward(grads: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    with library.no_autocast(x.device):
        return backward(grads, x, *args)


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
def _backward_fake(grads: Tensor, x: Tensor, y: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    need_x, need_y = rest[4], rest[5]
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
        settings: tuple[Any, ...],
    ) -> Any:
        terms, *saved = torch.ops.vicreg_kernels.vicreg_ranks_forward(
            x, y, need_x, need_y, *settings
        )
        ctx.save_for_backward(x, y, *saved)
        ctx.settings = settings
        return tuple(terms.unbind()) if all_terms else terms[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, *saved = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[:2]
        grad = torch.stack(grads) if len(grads) > 1 else grads[0].reshape(1)
        args = (grad, x, y, saved, need_x, need_y, ctx.settings)
        run = _Gradient.apply if torch.is_grad_enabled() else _gradient
        grad_x, grad_y = run(*args)
        return grad_x if need_x else None, grad_y if need_y else None, None, None, None, None


def _gradient(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    saved: list[Tensor],
    need_x: bool,
    need_y: bool,
    settings: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    op = torch.ops.vicreg_kernels.vicreg_ranks_backward
    return op(grad, x, y, *saved, need_x, need_y, *settings)


class _Gradient(torch.autograd.Function):
    """The backward op under create_graph=True: a second derivative is an error, not a silent 0."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        return _gradient(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("the fused VICReg differentiates once; backend='reference' to any order")


def terms(
    x: Tensor,
    y: Tensor | None,
    settings: tuple[Any, ...],
    backend: str,
    group: str,
    all_terms: bool,
) -> Any:
    """The whole batch's loss, or its four terms; x, y: own rows [G, n, D]."""
    if backend == "ranks":
        wanted = torch.is_grad_enabled()
        need_x = wanted and x.requires_grad
        need_y = wanted and y is not None and y.requires_grad
        return _Ranks.apply(x, y, need_x, need_y, all_terms, (*settings, group))
    margin, eps, unbiased, scales, weights, normalizer = settings
    rows = agree(x, y, settings, "reference", group)
    views = [
        distributed.gather_differentiable(OP, group, z.transpose(0, 1), rows).transpose(0, 1)
        for z in (x, y)
        if z is not None
    ]
    scales = _normalised(scales, x, normalizer)
    other = views[1] if len(views) > 1 else None
    out = reference.terms(views[0], other, margin, eps, unbiased, scales, weights)
    return out if all_terms else out[0]


def agree(
    x: Tensor, y: Tensor | None, settings: tuple[Any, ...], backend: str, group: str
) -> list[int]:
    """Rows of each rank; all ranks raise where one cannot or would do something else."""
    margin, eps, unbiased, scales, weights, normalizer = settings
    groups, rows, dim = x.shape
    facts = {
        "views": 1 if y is None else 2,
        "D": dim,
        "groups or positions": groups,
        "dtype": x.dtype,
        "margin": margin,
        "eps": eps,
        "unbiased": unbiased,
        "scales of the convention": tuple(scales),
        "weights (invariance, variance, covariance)": tuple(weights),
        "covariance normalizer": normalizer,
        "backend": backend,
    }
    return distributed.agree(distributed.by_name(group), OP, rows, facts)


def _normalised(scales: Sequence[float], x: Tensor, normalizer: str) -> tuple[float, float, float]:
    return scales[0], scales[1], scales[2] * covariance_scale(x.shape[-1], normalizer)


def forward(
    x: Tensor,
    y: Tensor | None,
    need_x: bool,
    need_y: bool,
    margin: float,
    eps: float,
    unbiased: bool,
    scales: list[float],
    weights: list[float],
    normalizer: str,
    group: str,
) -> tuple[Tensor, ...]:
    """terms, float32 [4], then moments, count and the gradients of x and y as above."""
    settings = (margin, eps, unbiased, scales, weights, normalizer)
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
    scale = _normalised(scales, x, normalizer)[2] / (groups * degrees * degrees)
    covariance = scale * square
    loss = weights[0] * invariance + weights[1] * variance + weights[2] * covariance
    found = torch.stack((loss, invariance, variance, covariance)).float()
    return found, moments, mean.new_full((1,), total), *gradients


def backward(
    grads: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    count: Tensor,
    gradient_x: Tensor,
    gradient_y: Tensor,
    need_x: bool,
    need_y: bool,
    margin: float,
    eps: float,
    unbiased: bool,
    scales: list[float],
    weights: list[float],
    normalizer: str,
    group: str,
) -> tuple[Tensor, Tensor]:
    """`ranks` times the whole batch's gradient at x and y, contiguous, empty where not needed.
    grads: float32 [1] (loss) or [4] (loss and terms), the same on every rank.
    """
    process_group = distributed.by_name(group)
    if dispatch.DEBUG:
        distributed.check_same(OP, process_group, "the loss's incoming gradient", grads)
    groups, _, dim = x.shape
    ranks = torch.distributed.get_world_size(process_group)
    degrees = (count - int(unbiased)).float()
    each = [
        (grads[0] * weight + (grads[i + 1] if len(grads) > 1 else 0.0)) * (scale * ranks)
        for i, (weight, scale) in enumerate(
            zip(weights, _normalised(scales, x, normalizer), strict=True)
        )
    ]
    a_invariance = each[0] * 2.0 / (count.float() * groups * dim)
    a_variance = each[1] / (groups * dim)
    a_covariance = each[2] * 4.0 / (groups * degrees * degrees)
    difference = None if y is None else (x.float() - y.float()).mul_(a_invariance)
    std = torch.sqrt(moments[:, :, 2] / degrees + eps)
    slope = torch.where(std >= margin, 0.0, -a_variance / (degrees * std))  # [V, G, D]

    found = [x.new_empty(0), x.new_empty(0)]
    for v, (z, gradient) in enumerate(((x, gradient_x), (y, gradient_y))):
        if z is None or not (need_x, need_y)[v]:
            continue
        high, low, _ = moments[v].unsqueeze(2).unbind(1)  # [G, 1, D]
        out = torch.sub(z, high, out=z.new_empty(z.shape, dtype=torch.float32)).sub_(low)
        out.mul_(slope[v].unsqueeze(1)).addcmul_(gradient, a_covariance)
        if difference is not None:
            out.add_(difference, alpha=1 - 2 * v)
        found[v] = out.to(z.dtype)
    return found[0], found[1]
