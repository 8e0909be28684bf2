"""What the VICReg op takes: every check, as functions of plain values whose results are kept.

A check sees a tensor as its shape, dtype, device and layout (`calls.seen`), so that a step's second
call with the same inputs finds its settings ready (`calls.remembered`).
"""

from __future__ import annotations

import math

import torch

from vicreg_kernels.core import calls, dispatch, reals
from vicreg_kernels.core import checks as shared
from vicreg_kernels.vicreg.contract import Settings
from vicreg_kernels.vicreg.conventions import CONVENTIONS

NORMALIZERS = ("d", "d(d-1)")
OR_NONE = ", a tensor of one element, or None"


def check_settings(
    *,
    margin: float,
    eps: float,
    convention: str = "vicreg",
    covariance_normalizer: str = "d",
    backend: str | None = None,
) -> tuple[float, float]:
    """Margin and eps as numbers; raises a ValueError or TypeError that names the first setting that
    is wrong.
    """
    if convention not in tuple(CONVENTIONS):
        raise ValueError(f"convention: got {convention!r}, takes one of {tuple(CONVENTIONS)}")
    if covariance_normalizer not in NORMALIZERS:
        raise ValueError(
            f"covariance_normalizer: got {covariance_normalizer!r}, takes one of {NORMALIZERS}"
        )
    eps, margin = reals.finite("eps", eps, 0), reals.margin(margin)
    dispatch.check_backend(backend)
    return float(margin), float(eps)


def _check_tensor(
    name: str, shape: torch.Size, dtype: torch.dtype, layout: torch.layout, shapes: str
) -> None:
    shared.dense_float(name, dtype, layout)
    if len(shape) < 2:
        raise ValueError(f"{name}: got shape {tuple(shape)}, takes {shapes}")


def check_extent(
    name: str, groups: int, rows: int, dim: int, normalizer: str, across_ranks: bool
) -> None:
    if rows < 2 and not across_ranks:
        raise ValueError(
            f"{name}: got {rows} rows, takes at least 2 (batch statistics need two samples)"
        )
    if rows < 1:
        raise ValueError(f"{name}: got {rows} rows, takes at least 1 on every rank")
    if groups < 1 or dim < 1:
        raise ValueError(f"{name}: got no elements (grouped shape {(groups, rows, dim)})")
    if normalizer == "d(d-1)" and dim < 2:
        raise ValueError(f"{name}: got D = 1, takes D >= 2 with the d(d-1) covariance normalizer")


@calls.remembered
def two_views(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.layout,
    shape_y: torch.Size,
    dtype_y: torch.dtype,
    device_y: torch.device,
    layout_y: torch.layout,
    invariance_weight: float | None,
    variance_weight: float | None,
    covariance_weight: float | None,
    margin: float,
    eps: float,
    convention: str,
    precision: str | None,
    backend: str | None,
    across_ranks: bool,
) -> Settings:
    """The settings of a loss of two views, seen as [N, D] or [B, ..., D]."""
    shared.precision(precision, across_ranks or None)
    margin, eps = check_settings(margin=margin, eps=eps, convention=convention, backend=backend)
    rule = CONVENTIONS[convention]
    shapes = "[N, D] or [B, ..., D]" if rule.positions else "[N, D]"
    _check_tensor("x", shape, dtype, layout, shapes)
    _check_tensor("y", shape_y, dtype_y, layout_y, shapes)
    if len(shape) > 2 and not rule.positions:
        raise ValueError(
            f"x: got shape {tuple(shape)}, takes [N, D] with convention={convention!r}"
        )
    shared.same_as_x((shape_y, dtype_y, device_y, layout_y), (shape, dtype, device, layout))
    rows, *positions, dim = shape
    check_extent("x", math.prod(positions), rows, dim, rule.normalizer, across_ranks)
    weights = []
    for name, weight, usual in zip(
        ("invariance", "variance", "covariance"),
        (invariance_weight, variance_weight, covariance_weight),
        rule.weights,
        strict=True,
    ):
        given = usual if weight is None else reals.finite(f"{name}_weight", weight, None, OR_NONE)
        weights.append(float(given))
    scales = (1.0, rule.variance_view, rule.covariance_view)
    own = (weights[0], weights[1], weights[2])
    return Settings(margin, eps, True, scales, own, rule.normalizer, precision == "tf32x3")


@calls.remembered
def one_view(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.layout,
    margin: float,
    eps: float,
    unbiased: bool,
    normalizer: str,
    precision: str | None,
    backend: str | None,
    across_ranks: bool,
) -> Settings:
    """The settings of the two terms of one set of embeddings, seen as [N, D] or [G, N, D]."""
    shared.precision(precision, across_ranks or None)
    margin, eps = check_settings(
        margin=margin, eps=eps, covariance_normalizer=normalizer, backend=backend
    )
    _check_tensor("z", shape, dtype, layout, "[N, D] or [G, N, D]")
    if len(shape) > 3:
        raise ValueError(f"z: got shape {tuple(shape)}, takes [N, D] or [G, N, D]")
    groups = 1 if len(shape) == 2 else shape[0]
    check_extent("z", groups, shape[-2], shape[-1], normalizer, across_ranks)
    both = (0.0, 1.0, 1.0)
    return Settings(margin, eps, bool(unbiased), both, both, normalizer, precision == "tf32x3")
