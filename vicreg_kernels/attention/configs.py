"""Launch configurations of the attention op's Triton kernels: a table, nearest shape wins.

`configs.json` maps a GPU's name, "default" (Hopper), "sm_100" (data centre Blackwell) or "sm_80"
(tensor cores fed from registers: all others) to rows of operand format ("single" or "half"), head
dim, tokens of the longest sample, and settings. It is edited by hand; only the three general tables
exist, chosen by counting and by the registers that compilation ahead of time reports, and no GPU
has measured them yet. Nothing is tuned while a model runs.

What was counted, for an H100 (228 KB of shared memory and 64 K registers a multiprocessor; a
launch must also fit the 99 KiB of smaller GPUs): a warp group multiplies 64 rows at once, so tiles
are multiples of 64 rows of what the program keeps; two programs a multiprocessor let one's
exponentials run under the other's products; three stages hide a load from L2 behind two tiles of
work; and a short sample takes tiles of 64, since 69 tokens in tiles of 128 x 128 waste 71 % of the
products. float32 splits each operand into two tf32 that stay in registers, hence its small tiles.
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
    """Each: (queries, keys, warps, stages) of a tile; key_gradient keeps keys, the others queries.

    turned: tiles of queries up to which the forward turns keys in its loop (triton_forward.py).
    """

    forward: tuple[int, int, int, int]
    key_gradient: tuple[int, int, int, int]
    query_gradient: tuple[int, int, int, int]
    turned: int = 2


@cache
def _rows(device: str, capability: int) -> tuple[tuple[str, tuple[int, int], Config], ...]:
    table = json.loads(TABLE.read_text())
    general = {9: "default", 10: "sm_100"}.get(capability, "sm_80")
    return tuple(
        (row["format"], (row["head_dim"], row["tokens"]), _config(row))
        for row in table.get(device, table[general])
    )


def _config(row: dict[str, Any]) -> Config:
    return Config(
        forward=tuple(row["forward"]),
        key_gradient=tuple(row["key_gradient"]),
        query_gradient=tuple(row["query_gradient"]),
    )


@cache
def nearest(device: str, capability: int, format: str, head_dim: int, tokens: int) -> Config:
    """The row of the smallest head dim that holds this one, then of the nearest length in octaves.

    capability: the major number; tokens: of the longest sample, or a bound.
    """
    family = "single" if format in ("fp32", "tf32") else "half"
    rows = [r for r in _rows(device, capability) if r[0] == family and r[1][0] >= head_dim]

    def distance(entry: tuple[str, tuple[int, int], Config]) -> tuple[int, float]:
        most, length = entry[1]
        return most, abs(math.log2(length / max(tokens, 1)))

    return min(rows, key=distance)[2]


def shipped() -> list[tuple[str, str, tuple[int, int], Config]]:
    """Every row of the table: (device, format, (head dim, tokens), configuration)."""
    devices = {"default": 9, "sm_100": 10, "sm_80": 8}
    return [(name, *row) for name, major in devices.items() for row in _rows(name, major)]
