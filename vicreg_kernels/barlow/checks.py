"""What the Barlow Twins op takes: every check, as functions of plain values whose results are kept
(`calls.remembered`).
"""

from __future__ import annotations

import torch

from vicreg_kernels import calls, dispatch, reals
from vicreg_kernels.barlow.conventions import CONVENTIONS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# eps, std_eps, unbiased, lambd: as the ops take them.
Settings = tuple[float, float, bool, float]


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
    if dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {dtype}, takes float32, bfloat16, float16 or float64")
    if layout != torch.strided:
        raise TypeError(f"{name}: got layout {layout}, takes a dense (strided) tensor")
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
    backend: str | None,
    across_ranks: bool,
) -> Settings:
    """The settings of a loss of two views, seen as [N, D]."""
    weight, added = check_settings(lambd=lambd, convention=convention, eps=eps, backend=backend)
    _check_tensor("x", shape, dtype, layout)
    _check_tensor("y", shape_y, dtype_y, layout_y)
    if shape != shape_y:
        raise ValueError(f"y: got shape {tuple(shape_y)}, takes x's shape {tuple(shape)}")
    if dtype != dtype_y:
        raise TypeError(f"y: got dtype {dtype_y}, takes x's dtype {dtype}")
    if device != device_y:
        raise ValueError(f"y: got device {device_y}, takes x's device {device}")
    least = 1 if across_ranks else 2
    if shape[0] < least:
        raise ValueError(f"x: got {shape[0]} rows, takes at least {least}")
    if shape[1] < 1:
        raise ValueError(f"x: got no elements (shape {tuple(shape)})")
    rule = CONVENTIONS[convention]
    root, deviation = (0.0, added) if rule.eps_on_std else (added, 0.0)
    return root, deviation, rule.unbiased, weight
