"""Launch configurations of the Barlow Twins op's Triton kernels, chosen by counting; no GPU has
measured them yet. Nothing is tuned while a model runs.
"""

from __future__ import annotations

from dataclasses import dataclass


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


def choose(format: str, rows: int, dim: int) -> Config:
    """format: of the operands, as in vicreg/triton_operands.py."""
    half = format not in ("fp32", "tf32")
    # Few columns leave the GPU idle unless their rows are split up early.
    block_rows = 1024 if dim >= 2048 else 256
    if min(rows, dim) >= LARGE_FROM:
        return Config(
            block_rows=block_rows,
            product=(128, 32 if half else 16, 8, 3),
            gradient=(128, 64, 32, 8, 3),
        )
    return Config(block_rows=block_rows)
