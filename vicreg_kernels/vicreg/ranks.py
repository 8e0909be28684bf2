"""The VICReg op on a batch that several ranks hold: each works on its own rows.

Plain torch products on every device: a rank's share is a rectangular product, a vendor GEMM's
home. With n rows here of N in all, V views of G groups and R ranks, a rank does

                            exchanges (elements a rank gives)       operations
    statistics              2 V G D + 1 float64, summed             7 V G n D
    N < D:   rows           V G n D, gathered                       forward 2 V G n N D
             squares        V float64, summed (half: + V G D)       backward 2 V G n N D
    N >= D:  covariance     V G D (D + step) / 2 float32, summed    forward V G n D (D + step)
                                                                    backward 2 V G n D^2

and the backward exchanges nothing: it needs the rank's rows of the Gram matrix and everyone's
centred rows, or the summed covariance, which the forward has. The gradient's projection by the
centring needs no sum over ranks either: the columns of (K Zc - Zc diag(d)) and of the hinge's
gradient sum to 1^T Zc (...) = 0 over the whole batch. Products run while the next view's rows, or
the last rows of the covariance, are on their way.

Saved for the gradient, where M = R max(n) counts the rows that fill every rank up to the longest:

    moments     float32 [V, G, 3, D]    as in op.py, of the whole batch
    count       float64 [1]             N
    squares     float32, flat           N < D: own rows of the Gram matrix, [V, G, n, M];
                                        else the scatter matrix without its diagonal, [V, G, D, D]
    everyone    flat                    N < D: centred rows of all, [V, M, G, D], the deflated
                                        columns zero; else empty
    deflated, index                     as in op.py, for own rows

Half inputs multiply centred values rounded to half, and what the Gram side subtracts is made of
those very values, as in the cuda backend. docs/distributed.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import dispatch, distributed
from vicreg_kernels.products import add_product
from vicreg_kernels.vicreg import ranks_squares, reference
from vicreg_kernels.vicreg.backends import DEFLATED_COLUMNS
from vicreg_kernels.vicreg.conventions import covariance_scale
from vicreg_kernels.vicreg.ranks_squares import OP

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_SETTINGS = (
    "float margin, float eps, bool unbiased, float[] scales, float[] weights, str normalizer,"
    " str group"
)
_LIBRARY.define(
    f"vicreg_ranks_forward(Tensor x, Tensor? y, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "vicreg_ranks_backward(Tensor grads, Tensor x, Tensor? y, Tensor moments, Tensor count,"
    " Tensor squares, Tensor everyone, Tensor deflated, Tensor index, bool need_x, bool need_y,"
    f" {_SETTINGS}) -> (Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "vicreg_ranks_forward", "CompositeExplicitAutograd")
def _forward(x: Tensor, y: Tensor | None, *settings: Any) -> tuple[Tensor, ...]:
    with torch.autocast(x.device.type, enabled=False):
        return forward(x, y, *settings)


@torch.library.impl(_LIBRARY, "vicreg_ranks_backward", "CompositeExplicitAutograd")
def _backward(grads: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return backward(grads, x, *args)


@torch.library.register_fake("vicreg_kernels::vicreg_ranks_forward")
def _forward_fake(x: Tensor, y: Tensor | None, *settings: Any) -> tuple[Tensor, ...]:
    groups, rows, dim = x.shape
    views = 1 if y is None else 2
    taken = min(DEFLATED_COLUMNS, dim)
    size = torch.library.get_ctx().new_dynamic_size  # what other ranks' rows decide
    return (
        x.new_empty(4, dtype=torch.float32),
        x.new_empty((views, groups, 3, dim), dtype=torch.float32),
        x.new_empty(1, dtype=torch.float64),
        x.new_empty(size(), dtype=torch.float32),
        x.new_empty(size()),
        x.new_empty((views, groups, taken, rows), dtype=torch.float32),
        x.new_empty((views, groups, taken), dtype=torch.int64),
    )


@torch.library.register_fake("vicreg_kernels::vicreg_ranks_backward")
def _backward_fake(grads: Tensor, x: Tensor, y: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    need_x, need_y = rest[6], rest[7]
    return x.new_empty(x.shape if need_x else (0,)), x.new_empty(x.shape if need_y else (0,))


class _Ranks(torch.autograd.Function):
    """Gives back what it saves, too: a compiled graph takes sizes it does not know from outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, settings: tuple[Any, ...]) -> Any:
        terms, *saved = torch.ops.vicreg_kernels.vicreg_ranks_forward(x, y, *settings)
        ctx.save_for_backward(x, y, *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        return (terms, *saved)

    @staticmethod
    def backward(ctx: Any, grads: Tensor, *_: Any) -> Any:
        x, y, *saved = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[:2]
        args = (grads, x, y, saved, need_x, need_y, ctx.settings)
        run = _Gradient.apply if torch.is_grad_enabled() else _gradient
        grad_x, grad_y = run(*args)
        return grad_x if need_x else None, grad_y if need_y else None, None


def _gradient(
    grads: Tensor,
    x: Tensor,
    y: Tensor | None,
    saved: list[Tensor],
    need_x: bool,
    need_y: bool,
    settings: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    op = torch.ops.vicreg_kernels.vicreg_ranks_backward
    return op(grads, x, y, *saved, need_x, need_y, *settings)


class _Gradient(torch.autograd.Function):
    """The backward op under create_graph=True: a second derivative is an error, not a silent 0."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        return _gradient(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("the fused VICReg differentiates once; backend='reference' to any order")


def choose(backend: str | None, dtype: torch.dtype) -> str:
    """ "ranks" or "reference": what runs for `backend` with a process group.

    Raises ValueError for another named backend.
    """
    dispatch.check_backend(backend)
    named = backend if backend is not None else dispatch.ENVIRONMENT_BACKEND
    if named not in (None, "reference"):
        source = "backend" if backend is not None else "VICREG_KERNELS_BACKEND"
        raise ValueError(
            f"{source}: got {named!r}, takes None or 'reference' with a process_group: a rank's "
            "share is a rectangular product of its rows with all rows, which torch's own matmul "
            "does on every device; the fused backends know the square ones of one process"
        )
    return "reference" if named or dtype == torch.float64 else "ranks"


def terms(
    x: Tensor, y: Tensor | None, settings: tuple[Any, ...], backend: str, group: str
) -> tuple[Tensor, ...]:
    """(loss, invariance, variance, covariance) of the whole batch; x, y: own rows [G, n, D]."""
    if backend == "ranks":
        return _Ranks.apply(x, y, (*settings, group))[0].unbind()
    margin, eps, unbiased, scales, weights, normalizer = settings
    rows = agree(x, y, settings, "reference", group)
    views = [
        distributed.gather_differentiable(OP, group, z.transpose(0, 1), rows).transpose(0, 1)
        for z in (x, y)
        if z is not None
    ]
    scales = _normalised(scales, x, normalizer)
    return reference.terms(
        views[0], views[1] if len(views) > 1 else None, margin, eps, unbiased, scales, weights
    )


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
    counts = distributed.agree(distributed.by_name(group), OP, rows, facts)
    if sum(counts) < 2:
        raise ValueError(
            f"x: got {sum(counts)} rows on all ranks together, takes at least 2 (batch statistics "
            "need two samples)"
        )
    return counts


def _normalised(scales: Sequence[float], x: Tensor, normalizer: str) -> tuple[float, float, float]:
    return scales[0], scales[1], scales[2] * covariance_scale(x.shape[-1], normalizer)


def forward(
    x: Tensor,
    y: Tensor | None,
    margin: float,
    eps: float,
    unbiased: bool,
    scales: list[float],
    weights: list[float],
    normalizer: str,
    group: str,
) -> tuple[Tensor, ...]:
    """terms, float32 [4], and the six tensors above. x, y: own rows, [G, n, D]."""
    settings = (margin, eps, unbiased, scales, weights, normalizer)
    rows = agree(x, y, settings, "ranks", group)
    ranks = distributed.by_name(group)
    total, (groups, _, dim) = sum(rows), x.shape
    degrees = total - int(unbiased)
    own, mean, scatter, difference = _statistics(x, y, rows, ranks)
    side = ranks_squares.gram if total < dim else ranks_squares.covariance
    square, scatter, *saved = side(own, scatter, x.dtype, rows, ranks)
    high, low = _two_floats(mean)
    moments = torch.stack((high, low, scatter.float()), dim=2)

    std = torch.sqrt(scatter / degrees + eps)
    invariance = scales[0] * difference / (total * groups * dim)
    variance = scales[1] * torch.relu(margin - std).mean(dim=(1, 2)).sum()
    scale = _normalised(scales, x, normalizer)[2] / (groups * degrees * degrees)
    covariance = scale * square
    loss = weights[0] * invariance + weights[1] * variance + weights[2] * covariance
    found = torch.stack((loss, invariance, variance, covariance)).float()
    return found, moments, mean.new_full((1,), total), *saved


def _two_floats(mean: Tensor) -> tuple[Tensor, Tensor]:
    """float64 as the sum of two float32, as in op.py."""
    high = mean.float()
    return high, (mean - high).float()


def _statistics(
    x: Tensor, y: Tensor | None, rows: list[int], group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """own [V, n, G, D] float32, the own rows less the whole batch's mean; mean, scatter
    [V, G, D] float64 of the whole batch; its sum of (x - y)^2, float64.

    One sum over ranks, of N mean and scatter + N mean^2: in float64 the second loses
    2^-53 (mean / std)^2, less than float32 rows with such a mean have lost already.
    """
    views = (x,) if y is None else (x, y)
    groups, count, dim = x.shape
    own = x.new_empty((len(views), count, groups, dim), dtype=torch.float32)
    packed = x.new_zeros(2 * own[:, 0].numel() + 1, dtype=torch.float64)
    sums, squares = packed[:-1].view(2, len(views), groups, dim)
    origin = own.new_empty((len(views), groups, dim))
    for v, z in enumerate(views):
        # About the rounded mean of the own rows, so that float32 sums are of small numbers.
        torch.mean(z, dim=-2, dtype=torch.float32, out=origin[v])
        shifted = torch.sub(z, origin[v].unsqueeze(1), out=own[v].transpose(0, 1))
        wide, first = origin[v].double(), shifted.sum(dim=-2).double()
        sums[v] = wide * count + first
        squares[v] = wide.square() * count + 2.0 * wide * first
        squares[v] += shifted.square().sum(dim=-2)
    if y is not None:
        packed[-1] = (x.float() - y.float()).square_().sum(dim=-1).sum(dtype=torch.float64)
    distributed.sum_ranks_(OP, group, packed)
    mean = sums / sum(rows)
    scatter = (squares - sums * mean).clamp(min=0.0)
    own.sub_((mean - origin).float().unsqueeze(1))
    return own, mean, scatter, packed[-1]


def backward(
    grads: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    count: Tensor,
    squares: Tensor,
    everyone: Tensor,
    deflated: Tensor,
    index: Tensor,
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
    grads: float32 [4], the same on every rank.
    """
    process_group = distributed.by_name(group)
    if dispatch.DEBUG:
        distributed.check_same(OP, process_group, "the loss's incoming gradient", grads)
    groups, rows, dim = x.shape
    views = len(moments)
    gram = everyone.numel() > 0
    ranks = torch.distributed.get_world_size(process_group)
    degrees = (count - int(unbiased)).float()
    normalised = _normalised(scales, x, normalizer)
    each = [
        (grads[0] * weight + grads[i + 1]) * (scale * ranks)
        for i, (weight, scale) in enumerate(zip(weights, normalised, strict=True))
    ]
    a_invariance = each[0] * 2.0 / (count.float() * groups * dim)
    a_variance = each[1] / (groups * dim)
    a_covariance = each[2] * 4.0 / (groups * degrees * degrees)
    difference = None if y is None else (x.float() - y.float()).mul_(a_invariance)

    std = torch.sqrt(moments[:, :, 2] / degrees + eps)
    factor = torch.where(std >= margin, 0.0, -a_variance / (degrees * std))  # [V, G, D]
    if gram:
        factor = factor - (a_covariance * moments[:, :, 2]).scatter(-1, index, 0.0)
        planes = everyone.view(views, -1, groups, dim).transpose(1, 2)  # [V, G, M, D]
        weight = squares.view(views, groups, rows, -1) * a_covariance
    else:
        weight = squares.view(views, groups, dim, dim) * a_covariance
    found = []
    for v, z in enumerate((x, y)):
        if not (need_x, need_y)[v]:
            found.append(x.new_empty(0))
            continue
        assert z is not None
        high, low, _ = moments[v].unsqueeze(2).unbind(1)  # [G, 1, D]
        out = torch.sub(z, high, out=z.new_empty(z.shape, dtype=torch.float32)).sub_(low)
        own = out.to(z.dtype)
        out = out.mul_(factor[v].unsqueeze(1)) if gram else out.mul(factor[v].unsqueeze(1))
        if difference is not None:
            out.add_(difference, alpha=1 - 2 * v)
        if gram:
            add_product(out, weight[v], planes[v])
            picked = ranks_squares.columns(index[v])
            out[picked] = out[picked] + a_covariance * deflated[v]
        else:
            add_product(out.mT, weight[v], own.mT)
        found.append(out.to(z.dtype))
    return found[0], found[1]
