"""What the Barlow Twins op takes: every check, as functions of plain values whose results are kept
(`calls.remembered`).
"""

from __future__ import annotations

import torch

from vicreg_kernels.barlow.contract import Settings
from vicreg_kernels.barlow.conventions import CONVENTIONS
from vicreg_kernels.core import calls, dispatch, reals
from vicreg_kernels.core import checks as shared


def check_settings(
    *,
    lambd: float | None = None,
    convention: str = "barlow_twins",
    eps: float | None = None,
    backend: str | None = None,
) -> tuple[float, float]:
    """lambd and eps as numbers, the convention's own for None. Raises a ValueError or TypeError
    that names the first setting that is wrong.
    """
    if convention not in tuple(CONVENTIONS):
        raise ValueError(f"convention: got {convention!r}, takes one of {tuple(CONVENTIONS)}")
    rule = CONVENTIONS[convention]
    lambd = rule.lambd if lambd is None else reals.finite("lambd", lambd, None, " or None")
    eps = rule.eps if eps is None else reals.finite("eps", eps, 0, " or None")
    dispatch.check_backend(backend)
    return float(lambd), float(eps)


def _check_tensor(name: str, shape: torch.Size, dtype: torch.dtype, layout: torch.layout) -> None:
    shared.dense_float(name, dtype, layout)
    if len(shape) != 2:
        raise ValueError(f"{name}: got shape {tuple(shape)}, takes [N, D]")


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
    lambd: float | None,
    convention: str,
    eps: float | None,
    precision: str | None,
    backend: str | None,
    across_ranks: bool,
) -> Settings:
    """The settings of a loss of two views, seen as [N, D]."""
    shared.precision(precision, across_ranks or None)
    weight, added = check_settings(lambd=lambd, convention=convention, eps=eps, backend=backend)
    _check_tensor("x", shape, dtype, layout)
    _check_tensor("y", shape_y, dtype_y, layout_y)
    shared.same_as_x((shape_y, dtype_y, device_y, layout_y), (shape, dtype, device, layout))
    least = 1 if across_ranks else 2
    if shape[0] < least:
        raise ValueError(f"x: got {shape[0]} rows, takes at least {least}")
    if shape[1] < 1:
        raise ValueError(f"x: got no elements (shape {tuple(shape)})")
    rule = CONVENTIONS[convention]
    root, deviation = (0.0, added) if rule.eps_on_std else (added, 0.0)
    return Settings(root, deviation, rule.unbiased, weight, precision == "tf32x3")
