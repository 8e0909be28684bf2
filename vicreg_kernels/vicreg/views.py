"""VICReg of more than two views, put together from the fused variance and covariance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.core import checks as shared
from vicreg_kernels.core import library, reals
from vicreg_kernels.vicreg import checks
from vicreg_kernels.vicreg.api import VICRegTerms, variance_covariance, weighted
from vicreg_kernels.vicreg.checks import OR_NONE
from vicreg_kernels.vicreg.conventions import CONVENTIONS, Convention
from vicreg_kernels.vicreg.ranks_squares import OP


def _check(
    views: Sequence[Tensor],
    weights: Sequence[Any],
    margin: float,
    eps: float,
    convention: str,
    backend: str | None,
    across_ranks: bool,
) -> Convention:
    checks.check_settings(margin=margin, eps=eps, convention=convention, backend=backend)
    rule = CONVENTIONS[convention]
    for name, weight in zip(("invariance", "variance", "covariance"), weights, strict=True):
        if weight is not None and not isinstance(weight, Tensor):
            reals.finite(f"{name}_weight", weight, None, OR_NONE)
    if len(views) < 2:
        raise ValueError(f"x: got a list of {len(views)} views, takes at least 2")
    for i, z in enumerate(views):
        name, first = f"x[{i}]", views[0]
        shared.is_tensor(name, z)
        shared.dense_float(name, z.dtype, z.layout)
        if z.dim() < 2 or (z.dim() > 2 and not rule.positions):
            takes = "[N, D] or [B, ..., D]" if rule.positions else "[N, D]"
            raise ValueError(
                f"{name}: got shape {tuple(z.shape)}, takes {takes} with convention={convention!r}"
            )
        if z.shape != first.shape:
            raise ValueError(
                f"{name}: got shape {tuple(z.shape)}, takes x[0]'s shape {tuple(first.shape)}"
            )
        shared.same_dtype(name, z.dtype, first.dtype, "x[0]'s dtype")
        shared.same_device(name, z.device, first.device, "x[0]'s device")
        rows, *positions, dim = z.shape
        checks.check_extent(name, math.prod(positions), rows, dim, rule.normalizer, across_ranks)
    return rule


def loss_of_views(
    views: Sequence[Tensor],
    weights: Sequence[Any],
    *,
    margin: float,
    eps: float,
    convention: str,
    precision: str | None,
    backend: str | None,
    process_group: Any,
) -> Tensor:
    """The VICReg loss of V >= 2 views: every mean is over all views or all pairs of views.

    With h the hinge and c the normalised sum of squared covariances of a view, and a, b the
    convention's factors,

        invariance = mean over pairs of mean((z_i - z_j)^2)
        variance = 2 a mean over views of h,    covariance = 2 b mean over views of c,

    which for V = 2 is `vicreg_loss`. The rule is that of VICRegL's embeddings
    (facebookresearch/VICRegL, main_vicregl.py, Bardes et al., 2022, arXiv:2210.01571), where a pair
    has at least one of the two large crops; here all pairs count.

    Args: views: a sequence of [N, D] (or [B, ..., D]); the others as in `vicreg_loss`.
    """
    group = None if process_group is None else distributed.group_name(process_group)
    rule = distributed.check_on_all_ranks(
        OP, group, _check, views, weights, margin, eps, convention, backend, group is not None
    )
    stacked = torch.stack(tuple(views))  # [V, N, ..., D]
    count = len(views)
    groups = stacked
    if stacked.dim() > 3:  # statistics per view and position: [V P, B, D]
        groups = stacked.flatten(2, -2).transpose(1, 2).flatten(0, 1)
    variance, covariance = variance_covariance(
        groups,
        margin=margin,
        eps=eps,
        covariance_normalizer=rule.normalizer,
        precision=precision,
        backend=backend,
        process_group=process_group,
    )
    with library.no_autocast(stacked.device):
        wide = stacked.to(variance.dtype)
        square = (wide - wide.mean(dim=0)).square()
        mean = square.mean() if group is None else distributed.mean_over_ranks(OP, square, group)
    # The squared distances of all pairs add up to V times those from the views' mean.
    invariance = 2.0 * count / (count - 1) * mean
    terms = VICRegTerms(
        mean,
        invariance,
        2.0 * rule.variance_view * variance,
        2.0 * rule.covariance_view * covariance,
    )
    return weighted(terms, weights, convention).loss
