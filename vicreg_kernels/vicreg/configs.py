"""Launch configurations of the VICReg op's Triton kernels: a table per GPU, nearest shape wins.

`configs.json` maps a GPU's name, or "default", to rows of operand format ("single" or "half"),
shape [N, D] and settings. It is edited by hand: only "default" exists, chosen by counting, and no
GPU has measured it yet. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class Config:
    """Tile sizes are in elements; stages are those of the software pipeline.

    statistics: (rows, columns, warps) of a tile; rows read in one block before they are split up.
    product: (tile, depth, warps, stages); programs a multiprocessor wanted from the split.
    strips: (rows, columns, warps).
    gradient: (rows, columns, depth, warps, stages).
    tma_product, tma_gradient: (rows, columns, depth, warps, stages, tiles in a band) of the
    products with TMA operands (tma.py); None where the others are used.
    """

    statistics: tuple[int, int, int]
    block_rows: int
    product: tuple[int, int, int, int]
    occupancy: int
    strips: tuple[int, int, int]
    gradient: tuple[int, int, int, int, int]
    tma_product: tuple[int, int, int, int, int, int] | None = None
    tma_gradient: tuple[int, int, int, int, int, int] | None = None


@cache
def _rows(device: str) -> tuple[tuple[str, tuple[int, int], Config], ...]:
    table = json.loads(TABLE.read_text())
    return tuple(
        (row["format"], tuple(row["shape"]), _config(row))
        for row in table.get(device, table["default"])
    )


def _config(row: dict[str, Any]) -> Config:
    return Config(
        statistics=tuple(row["statistics"]),
        block_rows=row["block_rows"],
        product=tuple(row["product"]),
        occupancy=row["occupancy"],
        strips=tuple(row["strips"]),
        gradient=tuple(row["gradient"]),
        tma_product=tuple(row["tma_product"]) if "tma_product" in row else None,
        tma_gradient=tuple(row["tma_gradient"]) if "tma_product" in row else None,
    )


@cache
def nearest(device: str, format: str, rows: int, dim: int) -> Config:
    """The configuration of the nearest shape in octaves, on the same side of N = D first."""

    family = "single" if format in ("fp32", "tf32") else "half"
    return _nearest([e for e in _rows(device) if e[0] == family], rows, dim)


@cache
def nearest_tma(device: str, rows: int, dim: int) -> Config:
    """The same among the rows with TMA tiles; `tma_side` says that there are any."""
    return _nearest([e for e in _rows(device) if e[2].tma_product is not None], rows, dim)


def _nearest(entries: list[tuple[str, tuple[int, int], Config]], rows: int, dim: int) -> Config:
    def distance(entry: tuple[str, tuple[int, int], Config]) -> tuple[bool, float]:
        n, d = entry[1]
        return (n < d) != (rows < dim), abs(math.log2(n / rows)) + abs(math.log2(d / dim))

    return min(entries, key=distance)[2]


@cache
def tma_side(device: str) -> int | None:
    """The least min(N, D) at which the products with TMA operands are used: that of the table's
    smallest shape with tiles for them. None: they are not used.
    """
    sides = (min(shape) for _, shape, config in _rows(device) if config.tma_product is not None)
    return min(sides, default=None)


def shipped() -> list[tuple[str, str, tuple[int, int], Config]]:
    """Every row of the table: (device, format, shape, configuration)."""
    return [(device, *row) for device in json.loads(TABLE.read_text()) for row in _rows(device)]
