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
    """

    statistics: tuple[int, int, int]
    block_rows: int
    product: tuple[int, int, int, int]
    occupancy: int
    strips: tuple[int, int, int]
    gradient: tuple[int, int, int, int, int]


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
    )


@cache
def nearest(device: str, format: str, rows: int, dim: int) -> Config:
    """The configuration of the nearest shape in octaves, on the same side of N = D first."""

    def distance(entry: tuple[str, tuple[int, int], Config]) -> tuple[bool, float]:
        n, d = entry[1]
        return (n < d) != (rows < dim), abs(math.log2(n / rows)) + abs(math.log2(d / dim))

    family = "single" if format in ("fp32", "tf32") else "half"
    return min((e for e in _rows(device) if e[0] == family), key=distance)[2]


def shipped() -> list[tuple[str, str, tuple[int, int], Config]]:
    """Every row of the table: (device, format, shape, configuration)."""
    return [(device, *row) for device in json.loads(TABLE.read_text()) for row in _rows(device)]
