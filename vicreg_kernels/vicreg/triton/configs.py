"""Launch configurations of the VICReg op's Triton kernels: a table per GPU, nearest shape wins.

`configs.json` holds the general table, "default": rows of operand format ("single" or "half"),
shape [N, D] and settings, edited by hand and chosen by counting; no GPU has measured it yet. What a
GPU has measured stands in `vicreg_kernels/configs`, and is used there in its place. Nothing is
tuned while a model runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from vicreg_kernels import configs as measured

TABLE = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class Config:
    """Tile sizes are in elements; stages are those of the software pipeline.

    statistics: (rows, columns, warps) of a tile; rows read in one block before they are split up.
    product: (tile, depth, warps, stages); programs a multiprocessor wanted from the split.
    strips: (rows, columns, warps).
    gradient: (rows, columns, depth, warps, stages).
    tma_product, tma_gradient: (rows, columns, depth, warps, stages, tiles in a band) of the
    products with TMA operands (tma.py); zeros where the others are used.
    """

    statistics: tuple[int, int, int]
    block_rows: int
    product: tuple[int, int, int, int]
    occupancy: int
    strips: tuple[int, int, int]
    gradient: tuple[int, int, int, int, int]
    tma_product: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    tma_gradient: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)

    @property
    def tma(self) -> bool:
        return self.tma_product[0] > 0 and self.tma_gradient[0] > 0


KEYS = {"shape": tuple[int, int]}


@measured.cached
def _general() -> tuple[measured.Row, ...]:
    rows = json.loads(TABLE.read_text())["default"]
    return tuple(
        measured.parse(row, Config, KEYS, f"{TABLE}: default[{i}]") for i, row in enumerate(rows)
    )


def _same_side(row: measured.Row, rows: int, dim: int) -> bool:
    n, d = row.key["shape"]
    return (n < d) == (rows < dim)


@measured.cached
def nearest(device: str, format: str, rows: int, dim: int) -> Config:
    """The configuration of the nearest shape in octaves, on the same side of N = D first: of the
    device's measured ones where it has any on that side, else of the general ones.
    """
    family = "single" if format in ("fp32", "tf32") else "half"
    own = measured.rows(device, "vicreg", Config, KEYS)
    fit = [r for r in own if r.format == family and _same_side(r, rows, dim)]

    return _nearest(fit or [r for r in _general() if r.format == family], rows, dim)


def _nearest(candidates: list[measured.Row], rows: int, dim: int) -> Config:
    def distance(row: measured.Row) -> tuple[bool, float]:
        n, d = row.key["shape"]
        apart = abs(math.log2(n / rows)) + abs(math.log2(d / dim))
        # Rounded: between equals the table's first, not what the last digit says of each shape.
        return not _same_side(row, rows, dim), round(apart, 6)

    return min(candidates, key=distance).config


def with_tma(config: Config, rows: int, dim: int) -> Config:
    """A configuration of `nearest` that has TMA tiles: itself, or the nearest general one."""
    if config.tma:
        return config
    return _nearest([r for r in _general() if r.config.tma], rows, dim)


@measured.cached
def tma_side(device: str) -> int | None:
    """The least min(N, D) at which half precision is multiplied with TMA operands: that of the
    smallest shape with tiles for them, of the device's measured rows where it has any in half
    precision, else of the general ones. None: nowhere.
    """
    own = [r for r in measured.rows(device, "vicreg", Config, KEYS) if r.format == "half"]
    return min((min(r.key["shape"]) for r in own or _general() if r.config.tma), default=None)


def shipped() -> list[tuple[str, str, tuple[int, int], Config]]:
    """Every row, general and measured: (device, format, shape, configuration)."""
    device_rows = [("default", row) for row in _general()]
    for device in measured.devices():
        device_rows += [(device, row) for row in measured.rows(device, "vicreg", Config, KEYS)]
    return [(device, row.format, row.key["shape"], row.config) for device, row in device_rows]
