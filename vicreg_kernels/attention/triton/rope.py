"""Rotary position in Triton: pairs turned in float32 by cosines and sines from the table.

A tile's elements lie in registers, 2i beside 2i + 1, so a pair is had by reshape and split, without
a second load; its two cosines and two sines are 16 consecutive bytes of the table, one load. The
table has (frames + height + width) * part * 8 bytes, about 6 KB, and stays in the L1 cache.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.attention.triton.rules import FAR, extent, find_sample
from vicreg_kernels.attention.triton.tiles import (
    VARYING,
    load_part,
    load_rows,
    rounded,
    store_part,
    strides,
)


@triton.jit
def place_of(index, indexed, at, row, live, last):
    """Places [R] in the grid: index[at + row] if indexed, else the place in the sample; kept inside
    the grid.
    """
    # a limit, since the interpreter spoils a mask combined with a single truth value
    given = live & (row < tl.where(indexed, FAR, 0))
    place = tl.where(indexed, tl.load(index + at + row, mask=given, other=0), row)
    return tl.where((place < 0) | (place > last), last, place)


@triton.jit
def cosines(
    table, place, frames, height, width, axes, part,
    TURNED: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """For columns FIRST to FIRST + WIDTH: cosine and sine of even, of odd elements, [R, WIDTH/2].

    Columns from TURNED = axes * part on get numbers that `turned` does not use.
    """
    column = place % width
    row = place // width % height
    frame = place // width // height
    c = frames + height + column
    b = tl.where(axes == 3, frames + row, c)
    a = tl.where(axes == 3, frame, tl.where(axes == 2, frames + row, c))
    part = part // 2 * 2  # shows that it is even, so that four numbers are one load
    j = FIRST + 2 * tl.arange(0, WIDTH // 2)
    axis = (j >= part).to(tl.int32) + (j >= 2 * part).to(tl.int32)
    line = tl.where(
        (axis == 0)[None, :], a[:, None], tl.where((axis == 1)[None, :], b[:, None], c[:, None])
    )
    at = (line * part + (j - axis * part)[None, :]) * 2
    four = table + at[:, :, None] + tl.arange(0, 4)[None, None, :]
    both = tl.load(four, mask=(j < TURNED)[None, :, None], other=0.0)
    cos, sin = tl.split(tl.reshape(both, (place.shape[0], WIDTH // 2, 2, 2)))
    cos_even, cos_odd = tl.split(cos)
    sin_even, sin_odd = tl.split(sin)
    return cos_even, sin_even, cos_odd, sin_odd


@triton.jit
def turned(
    x, cos_even, sin_even, cos_odd, sin_odd,
    TURNED: tl.constexpr, FIRST: tl.constexpr, ADJOINT: tl.constexpr,
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
    if FIRST + W > TURNED:
        some = (FIRST + 2 * tl.arange(0, W // 2) < TURNED)[None, :]
        even = tl.where(some, even, a)
        odd = tl.where(some, odd, b)
    return tl.reshape(tl.join(even, odd), (R, W))


@triton.jit
def turn(
    x, table, place, frames, height, width, axes, part,
    TURNED: tl.constexpr, FIRST: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """x: [R, W] of any float type, turned by places [R]; float32."""
    W: tl.constexpr = x.shape[1]
    ce, se, co, so = cosines(table, place, frames, height, width, axes, part, TURNED, FIRST, W)
    return turned(x.to(tl.float32), ce, se, co, so, TURNED, FIRST, ADJOINT)


@triton.jit
def load_turned(
    base, start, stride_t, stride_d, live, table, index, indexed, at,
    frames, height, width, last, axes, part, TURNED: tl.constexpr, MASKED: tl.constexpr,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """load_rows, then TURNED columns turned: each row by index[at + row], or by itself."""
    x1, x2 = load_rows(base, start, stride_t, stride_d, live, MASKED, HEAD, D1, D2, ROWS, FORMAT)
    if TURNED:
        place = place_of(index, indexed, at, start + tl.arange(0, ROWS), live, last)
        x1 = turn(x1, table, place, frames, height, width, axes, part, TURNED, 0, False)
        x1 = rounded(x1, FORMAT)
        if D2:
            x2 = turn(x2, table, place, frames, height, width, axes, part, TURNED, D1, False)
            x2 = rounded(x2, FORMAT)
    return x1, x2


@triton.jit
def store_gradient(
    base, along, live, x1, x2, row, table, index, indexed, at,
    frames, height, width, last, axes, part, TURNED: tl.constexpr,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Stores both parts, float32, TURNED columns turned back first."""
    if TURNED:
        place = place_of(index, indexed, at, row, live, last)
        x1 = turn(x1, table, place, frames, height, width, axes, part, TURNED, 0, True)
        if D2:
            x2 = turn(x2, table, place, frames, height, width, axes, part, TURNED, D1, True)
    store_part(base, along, live, x1, 0, HEAD, FORMAT)
    if D2:
        store_part(base, along, live, x2, D1, HEAD, FORMAT)


@triton.jit(do_not_specialize=VARYING)
def rotate_kernel(
    x, out, table, index, offsets,
    samples, heads, tokens, tiles, indexed, index_stride, frames, height, width, last, axes, part,
    adjoint, sx_b, sx_h, sx_t, sx_d,
    ALIGNED: tl.constexpr, TURNED: tl.constexpr, FORMAT: tl.constexpr,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of HEADS heads of one sample, out: [B, T, H, d].

    Reads and writes each element once; a token's angles are looked up once for HEADS heads.
    samples > 0: places are counted in each sample, so tiles must not run over its end.
    """
    sx_b, sx_h, sx_t, sx_d = strides(sx_b, sx_h, sx_t, sx_d, ALIGNED)
    groups = tl.cdiv(heads, HEADS)
    group = tl.program_id(0) % groups
    tile = tl.program_id(0) // groups % tiles
    batch = tl.program_id(0) // groups // tiles
    sample, tile = find_sample(offsets, samples, batch, tile, TOKENS)
    begin, count = extent(offsets, samples, sample, tokens)
    if tile * TOKENS >= count:
        return
    row = tile * TOKENS + tl.arange(0, TOKENS)
    live = row < count
    token = tl.cast(begin + row, tl.int64)
    b = tl.cast(batch, tl.int64)
    place = place_of(index + b * index_stride, indexed > 0, begin, row, live, last)
    ce, se, co, so = cosines(table, place, frames, height, width, axes, part, TURNED, 0, D1)
    se, so = tl.where(adjoint > 0, -so, se), tl.where(adjoint > 0, -se, so)
    if D2:
        ce2, se2, co2, so2 = cosines(
            table, place, frames, height, width, axes, part, TURNED, D1, D2
        )
        se2, so2 = tl.where(adjoint > 0, -so2, se2), tl.where(adjoint > 0, -se2, so2)
    for i in range(0, HEADS):
        head = group * HEADS + i
        some = row < tl.where(head < heads, count, 0)
        h = tl.cast(head, tl.int64)
        source = x + b * sx_b + h * sx_h
        target = out + (b * tokens * heads + h) * HEAD
        z = load_part(source, token * sx_t, some, sx_d, 0, D1, HEAD, True).to(tl.float32)
        z = turned(z, ce, se, co, so, TURNED, 0, False)
        store_part(target, token * heads * HEAD, some, z, 0, HEAD, FORMAT)
        if D2:
            z = load_part(source, token * sx_t, some, sx_d, D1, D2, HEAD, True).to(tl.float32)
            z = turned(z, ce2, se2, co2, so2, TURNED, D1, False)
            store_part(target, token * heads * HEAD, some, z, D1, HEAD, FORMAT)
