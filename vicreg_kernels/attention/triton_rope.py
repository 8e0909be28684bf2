"""Rotary position in Triton: pairs turned in float32 by cosines and sines from the table.

A tile's elements lie in registers, 2i beside 2i + 1, so a pair is had by reshape and split, without
a second load; its two cosines and two sines are 16 consecutive bytes of the table, one load. The
table has (frames + height + width) * part * 8 bytes, about 6 KB, and stays in the L1 cache.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.attention.triton_rules import extent, find_sample
from vicreg_kernels.attention.triton_tiles import (
    VARYING,
    load_part,
    load_rows,
    rounded,
    store_part,
    strides,
)


@triton.jit
def place_of(index, at, row, live, last, INDEX: tl.constexpr):
    """Places [R] in the grid: index[at + row], or the place in the sample; kept inside the grid."""
    place = row
    if INDEX:
        place = tl.load(index + at + row, mask=live, other=0)
    return tl.where((place < 0) | (place > last), last, place)


@triton.jit
def cosines(
    table, place, frames, height, width,
    AXES: tl.constexpr, PART: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """For columns FIRST to FIRST + WIDTH: cosine and sine of even, of odd elements, [R, WIDTH/2].

    Columns that no axis turns get numbers that `turned` does not use.
    """
    column = place % width
    row = place // width % height
    frame = place // width // height
    last_axis = frames + height + column
    if AXES == 1:
        a = last_axis
        b = last_axis
        c = last_axis
    elif AXES == 2:
        a = frames + row
        b = last_axis
        c = last_axis
    else:
        a = frame
        b = frames + row
        c = last_axis
    j = FIRST + 2 * tl.arange(0, WIDTH // 2)
    axis = (j // PART)[None, :]
    line = tl.where(axis == 0, a[:, None], tl.where(axis == 1, b[:, None], c[:, None]))
    at = (line * PART + (j % PART)[None, :]) * 2
    four = table + at[:, :, None] + tl.arange(0, 4)[None, None, :]
    both = tl.load(four, mask=(j < AXES * PART)[None, :, None], other=0.0)
    cos, sin = tl.split(tl.reshape(both, (place.shape[0], WIDTH // 2, 2, 2)))
    cos_even, cos_odd = tl.split(cos)
    sin_even, sin_odd = tl.split(sin)
    return cos_even, sin_even, cos_odd, sin_odd


@triton.jit
def turned(
    x, cos_even, sin_even, cos_odd, sin_odd,
    AXES: tl.constexpr, PART: tl.constexpr, FIRST: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """x: float32 [R, W], columns from FIRST on."""
    R: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    a, b = tl.split(tl.reshape(x, (R, W // 2, 2)))
    if ADJOINT:
        even = a * cos_even + b * sin_odd
        odd = b * cos_odd - a * sin_even
    else:
        even = a * cos_even - b * sin_even
        odd = b * cos_odd + a * sin_odd
    if FIRST + W > AXES * PART:
        some = (FIRST + 2 * tl.arange(0, W // 2) < AXES * PART)[None, :]
        even = tl.where(some, even, a)
        odd = tl.where(some, odd, b)
    return tl.reshape(tl.join(even, odd), (R, W))


@triton.jit
def turn(
    x, table, place, frames, height, width,
    AXES: tl.constexpr, PART: tl.constexpr, FIRST: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """x: [R, W] of any float type, turned by places [R]; float32."""
    W: tl.constexpr = x.shape[1]
    ce, se, co, so = cosines(table, place, frames, height, width, AXES, PART, FIRST, W)
    return turned(x.to(tl.float32), ce, se, co, so, AXES, PART, FIRST, ADJOINT)


@triton.jit
def load_turned(
    base, start, stride_t, stride_d, live, table, index, at, frames, height, width, last,
    INDEX: tl.constexpr, AXES: tl.constexpr, PART: tl.constexpr, MASKED: tl.constexpr,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """load_rows, then turned if AXES: each row by index[at + row], or by itself."""
    x1, x2 = load_rows(base, start, stride_t, stride_d, live, MASKED, HEAD, D1, D2, ROWS, FORMAT)
    if AXES:
        place = place_of(index, at, start + tl.arange(0, ROWS), live, last, INDEX)
        x1 = turn(x1, table, place, frames, height, width, AXES, PART, 0, False)
        x1 = rounded(x1, FORMAT)
        if D2:
            x2 = turn(x2, table, place, frames, height, width, AXES, PART, D1, False)
            x2 = rounded(x2, FORMAT)
    return x1, x2


@triton.jit
def store_gradient(
    base, along, live, x1, x2, row, table, index, at, frames, height, width, last,
    INDEX: tl.constexpr, AXES: tl.constexpr, PART: tl.constexpr,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Stores both parts, float32, turned back first if AXES."""
    if AXES:
        place = place_of(index, at, row, live, last, INDEX)
        x1 = turn(x1, table, place, frames, height, width, AXES, PART, 0, True)
        if D2:
            x2 = turn(x2, table, place, frames, height, width, AXES, PART, D1, True)
    store_part(base, along, live, x1, 0, HEAD, FORMAT)
    if D2:
        store_part(base, along, live, x2, D1, HEAD, FORMAT)


@triton.jit(do_not_specialize=VARYING)
def rotate_kernel(
    x, out, table, index, offsets,
    samples, heads, tokens, tiles, index_stride, frames, height, width, last,
    sx_b, sx_h, sx_t, sx_d,
    ALIGNED: tl.constexpr, RAGGED: tl.constexpr, INDEX: tl.constexpr, ADJOINT: tl.constexpr,
    AXES: tl.constexpr, PART: tl.constexpr, FORMAT: tl.constexpr,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of HEADS heads of one sample, out: [B, T, H, d].

    Reads and writes each element once; a token's angles are looked up once for HEADS heads.
    RAGGED: places are counted in each sample, so tiles must not run over its end.
    """
    sx_b, sx_h, sx_t, sx_d = strides(sx_b, sx_h, sx_t, sx_d, ALIGNED)
    groups = tl.cdiv(heads, HEADS)
    group = tl.program_id(0) % groups
    tile = tl.program_id(0) // groups % tiles
    batch = tl.program_id(0) // groups // tiles
    sample = batch
    if RAGGED:
        sample, tile = find_sample(offsets, samples, tile, TOKENS)
    begin, count = extent(offsets, sample, tokens, RAGGED)
    if tile * TOKENS >= count:
        return
    row = tile * TOKENS + tl.arange(0, TOKENS)
    live = row < count
    token = tl.cast(begin + row, tl.int64)
    b = tl.cast(batch, tl.int64)
    place = place_of(index + b * index_stride, begin, row, live, last, INDEX)
    ce, se, co, so = cosines(table, place, frames, height, width, AXES, PART, 0, D1)
    if D2:
        ce2, se2, co2, so2 = cosines(table, place, frames, height, width, AXES, PART, D1, D2)
    for i in range(0, HEADS):
        head = group * HEADS + i
        some = row < tl.where(head < heads, count, 0)
        h = tl.cast(head, tl.int64)
        source = x + b * sx_b + h * sx_h
        target = out + (b * tokens * heads + h) * HEAD
        z = load_part(source, token * sx_t, some, sx_d, 0, D1, HEAD, True).to(tl.float32)
        z = turned(z, ce, se, co, so, AXES, PART, 0, ADJOINT)
        store_part(target, token * heads * HEAD, some, z, 0, HEAD, FORMAT)
        if D2:
            z = load_part(source, token * sx_t, some, sx_d, D1, D2, HEAD, True).to(tl.float32)
            z = turned(z, ce2, se2, co2, so2, AXES, PART, D1, ADJOINT)
            store_part(target, token * heads * HEAD, some, z, D1, HEAD, FORMAT)
