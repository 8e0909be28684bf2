"""Launch configurations of the attention op's Triton kernels: a table, nearest shape wins.

`configs.json` holds three general tables, "default" (Hopper), "sm_100" (data centre Blackwell) and
"sm_80" (tensor cores fed from registers: all others): rows of operand format ("single" or "half"),
head dim, tokens of the longest sample, and settings. They are edited by hand, chosen by counting
and by the registers that compilation ahead of time reports; no GPU has measured them yet. What a
GPU has measured stands in `vicreg_kernels/configs`, and is used there in their place. Nothing is
tuned while a model runs.

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
from pathlib import Path

from vicreg_kernels import configs as measured

TABLE = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class Config:
    """Each: (queries, keys, warps, stages) of a tile; key_gradient keeps keys, the others queries.

    turned: tiles of queries up to which the forward turns keys in its loop (forward.py).
    """

    forward: tuple[int, int, int, int]
    key_gradient: tuple[int, int, int, int]
    query_gradient: tuple[int, int, int, int]
    turned: int = 2


KEYS = {"head_dim": int, "tokens": int}
# The general tables, by the major number of the capability they are for.
GENERAL = {9: "default", 10: "sm_100", 8: "sm_80"}


@measured.cached
def _general(name: str) -> tuple[measured.Row, ...]:
    rows = json.loads(TABLE.read_text())[name]
    return tuple(
        measured.parse(row, Config, KEYS, f"{TABLE}: {name}[{i}]") for i, row in enumerate(rows)
    )


@measured.cached
def nearest(device: str, capability: int, format: str, head_dim: int, tokens: int) -> Config:
    """The row of the smallest head dim that holds this one, then of the nearest length in octaves:
    of the device's measured ones where one holds it, else of the general ones.

    capability: the major number; tokens: of the longest sample, or a bound.
    """
    family = "single" if format in ("fp32", "tf32") else "half"

    def fit(rows: tuple[measured.Row, ...]) -> list[measured.Row]:
        return [r for r in rows if r.format == family and r.key["head_dim"] >= head_dim]

    def distance(row: measured.Row) -> tuple[int, float]:
        return row.key["head_dim"], abs(math.log2(row.key["tokens"] / max(tokens, 1)))

    own = fit(measured.rows(device, "attention", Config, KEYS))
    return min(own or fit(_general(GENERAL.get(capability, "sm_80"))), key=distance).config


def shipped() -> list[tuple[str, str, tuple[int, int], Config]]:
    """Every row, general and measured: (device, format, (head dim, tokens), configuration)."""
    rows = [(name, row) for name in GENERAL.values() for row in _general(name)]
    for device in measured.devices():
        rows += [(device, row) for row in measured.rows(device, "attention", Config, KEYS)]
    return [
        (device, row.format, (row.key["head_dim"], row.key["tokens"]), row.config)
        for device, row in rows
    ]
