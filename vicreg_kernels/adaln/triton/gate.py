"""The gated residual in Triton: tiles of ROWS tokens and COLUMNS elements. GPU times: not measured
yet.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.core.triton.operands import round_if
from vicreg_kernels.core.triton.strides import across, along

# What no kernel is specialised on.
SIZES = [
    "frames", "tokens", "dim", "tiles", *(f"s{z}" for z in ("y_f", "y_t", "y_d", "o_f", "o_d")),
]  # fmt: skip


@triton.jit
def load_tile(base, frame, token, column, inside, s_f, s_t, s_d, UNIT: tl.constexpr):
    """[ROWS, COLUMNS] in float32; frame, token: [ROWS, 1], column: [1, COLUMNS]."""
    at = base + frame * across(s_f, UNIT) + token * across(s_t, UNIT)
    return tl.load(at + column * along(s_d, UNIT), mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=[*SIZES, "sx_f", "sx_t", "sx_d"])
def gate_kernel(
    x, y, gate, out, frames, tokens, dim, tiles, sx_f, sx_t, sx_d, sy_f, sy_t, sy_d, so_f, so_d,
    UNIT: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program a tile. dim and strides: in UNITs."""
    dim *= UNIT
    block = tl.program_id(0).to(tl.int64)
    row = (block // tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (block % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < frames * tokens) & (column < dim)
    frame = row // tokens
    token = row % tokens
    own = load_tile(x, frame, token, column, inside, sx_f, sx_t, sx_d, UNIT)
    branch = load_tile(y, frame, token, column, inside, sy_f, sy_t, sy_d, UNIT)
    opened = load_tile(gate, frame, token, column, inside, so_f, 0, so_d, UNIT)
    value = own + opened * branch
    tl.store(out + row * dim + column, round_if(value, out, ROUND), mask=inside)


@triton.jit(do_not_specialize=[*SIZES, "parts", "part_tokens", "sg_f", "sg_t", "sg_d"])
def gate_gradient_kernel(
    grad, y, gate, to_y, to_gate, frames, tokens, dim, tiles, parts, part_tokens,
    sg_f, sg_t, sg_d, sy_f, sy_t, sy_d, so_f, so_d,
    FRAMES: tl.constexpr, NEED_Y: tl.constexpr, NEED_GATE: tl.constexpr, UNIT: tl.constexpr,
    ROUND: tl.constexpr, ROUND_GATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program a tile of columns of a part of a frame's tokens, or of all, as in norm.py."""
    dim *= UNIT
    block = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0).to(tl.int64) % tiles
    column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    begin = (block % parts) * part_tokens
    end = tl.minimum(begin + part_tokens, tokens if FRAMES else frames)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < end) & (column < dim)
        token = row if FRAMES else row * 0
        frame = row * 0 + block // parts if FRAMES else row
        g = load_tile(grad, frame, token, column, inside, sg_f, sg_t, sg_d, UNIT)
        if NEED_Y:
            opened = load_tile(gate, frame, token, column, inside, so_f, 0, so_d, UNIT)
            to = (frame * tokens + token) * dim + column
            tl.store(to_y + to, round_if(opened * g, to_y, ROUND), mask=inside)
        if NEED_GATE:
            branch = load_tile(y, frame, token, column, inside, sy_f, sy_t, sy_d, UNIT)
            if FRAMES:
                total += g * branch
            else:
                to = row * dim + column
                tl.store(to_gate + to, round_if(g * branch, to_gate, ROUND_GATE), mask=inside)
    if FRAMES and NEED_GATE:
        to = block * dim + tile * COLUMNS + tl.arange(0, COLUMNS)
        kept = tile * COLUMNS + tl.arange(0, COLUMNS) < dim
        value = tl.sum(total, axis=0)
        tl.store(to_gate + to, round_if(value, to_gate, ROUND_GATE), mask=kept)
