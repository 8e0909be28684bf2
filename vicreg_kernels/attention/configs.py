"""Launch configurations of the attention op's Triton kernels: a table, nearest shape wins.

`configs.json` maps a GPU's name, or "default", to rows of operand format ("single" or "half"), head
dim, tokens of the longest sample, and settings. It is edited by hand: only "default" exists, chosen
by counting, and no GPU has measured it yet. Nothing is tuned while a model runs.

What was counted, for an H100 (228 KB of shared memory and 64 K registers a multiprocessor; a
launch must also fit the 99 KiB of smaller GPUs): a warp group multiplies 64 rows at once, so tiles
are multiples of 64 rows of queries or keys; two programs a multiprocessor let one's exponentials
run under the other's products; three stages hide a load from L2 behind two tiles of work; and a
short sample takes tiles of 64, since 69 tokens in tiles of 128 x 128 waste 71 % of the products.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
def _rows(device: str) -> tuple[tuple[str, tuple[int, int], Config], ...]:
    table = json.loads(TABLE.read_text())
    return tuple(
        (
            row["format"],
            (row["head_dim"], row["tokens"]),
            Config(
                tuple(row["forward"]),
                tuple(row["key_gradient"]),
                tuple(row["query_gradient"]),
            ),
        )
        for row in table.get(device, table["default"])
    )


@cache
def nearest(device: str, format: str, head_dim: int, tokens: int) -> Config:
    """The row of the smallest head dim that holds this one, then of the nearest length in octaves;
    tokens: of the longest sample, or a bound.
    """
    family = "single" if format in ("fp32", "tf32") else "half"
    rows = [row for row in _rows(device) if row[0] == family and row[1][0] >= head_dim]
    least = min(row[1][0] for row in rows)
    octaves = lambda row: abs(math.log2(row[1][1] / max(tokens, 1)))  # noqa: E731
    return min((row for row in rows if row[1][0] == least), key=octaves)[2]


def shipped() -> list[tuple[str, str, tuple[int, int], Config]]:
    """Every row of the table: (device, format, (head dim, tokens), configuration)."""
    return [(device, *row) for device in json.loads(TABLE.read_text()) for row in _rows(device)]
