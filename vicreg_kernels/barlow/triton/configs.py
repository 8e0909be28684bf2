"""Launch configurations of the Barlow Twins op's Triton kernels. The general ones are chosen by
counting; no GPU has measured them yet. What a GPU has measured stands in `vicreg_kernels/configs`,
and is used there in their place. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vicreg_kernels import configs as measured


@dataclass(frozen=True)
class Config:
    """Tile sizes are in elements; stages are those of the software pipeline.

    statistics: (rows, columns, warps) of a tile; rows read in one block before they are split up.
    product: (tile, depth, warps, stages); programs a multiprocessor wanted from the split, and the
        fewest steps of `depth` that are worth a split.
    combine: (tile, splits read at once, warps). inner: the same where there are no splits.
    squares: (strip, width, warps).
    gradient: (rows, columns, depth, warps, stages).
    finish: (rows, columns, warps); programs a multiprocessor wanted.
    """

    statistics: tuple[int, int, int] = (16, 64, 4)
    block_rows: int = 1024
    product: tuple[int, int, int, int] = (64, 32, 4, 3)
    occupancy: int = 1
    least_steps: int = 4
    combine: tuple[int, int, int] = (16, 8, 4)
    inner: tuple[int, int, int] = (64, 1, 8)
    squares: tuple[int, int, int] = (16, 64, 4)
    gradient: tuple[int, int, int, int, int] = (64, 64, 32, 4, 3)
    finish: tuple[int, int, int] = (8, 128, 4)
    finish_occupancy: int = 4


# The square matrix's edge from which 128 x 128 tiles still fill a GPU of 132 multiprocessors: 136
# tiles of the triangle at 2048. A tile twice as wide reads half as much of the views.
LARGE_FROM = 2048


KEYS = {"shape": tuple[int, int]}


@measured.cached
def choose(device: str, format: str, rows: int, dim: int) -> Config:
    """The device's measured configuration of the nearest shape in octaves on this side of N = D,
    else the general one. format: of the operands, as in core/triton/operands.py.
    """
    family = "single" if format in ("fp32", "tf32") else "half"
    fit = [
        (abs(math.log2(n / rows)) + abs(math.log2(d / dim)), row.config)
        for row in measured.rows(device, "barlow", Config, KEYS)
        for n, d in (row.key["shape"],)
        if row.format == family and (n < d) == (rows < dim)
    ]
    return min(fit, key=lambda each: each[0])[1] if fit else general(family, rows, dim)


def general(family: str, rows: int, dim: int) -> Config:
    """family: "single" or "half"."""
    half = family == "half"
    # Few columns leave the GPU idle unless their rows are split up early.
    block_rows = 1024 if dim >= 2048 else 256
    if min(rows, dim) >= LARGE_FROM:
        return Config(
            block_rows=block_rows,
            product=(128, 32 if half else 16, 8, 3),
            gradient=(128, 64, 32, 8, 3),
        )
    return Config(block_rows=block_rows)
