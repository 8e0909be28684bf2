"""Projections and their column sums of cos(t p) and sin(t p): the SIGReg op's forward in Triton.

A projection costs one sincos for up to 16 equally spaced knots. Forward, knots are taken in pairs
mu +- d_j about the middle of their range:

    sum cos(mu +- d_j) = sum cos mu cos d_j -+ sum sin mu sin d_j
    sum sin(mu +- d_j) = sum sin mu cos d_j +- sum cos mu sin d_j

four multiply-adds a pair to add up and four to rotate d_j on, instead of four and eight.

The column sums are not taken in the product's own registers. A matrix instruction spreads a column
over 8 lanes and all warps, and 2 K reductions of a 128 x 64 tile would shuffle 3 times for every 4
values, about 190 issue slots a knot and thread where the sum itself takes 64 to 128. A tile of
projections has to be written anyway, for the backward; its program reads it back by columns, a lane
a column, from its own L1 or L2, with all sums in registers, and meets other lanes once.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,assignment"
# ruff: noqa: RUF005  (Triton's compiler adds tuples up, and does not unpack them)
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.sigreg.triton.maths import (
    MOST_CHUNKS,
    MOST_KNOTS,
    SINGLES,
    SIZES,
    circle,
    operand,
    rotate,
    twice,
)


@triton.jit
def paired_sums(
    projections, row, last, column, slices,
    chunk, turns,
    ROWS: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """sum cos mu cos d, sin mu sin d, sin mu cos d, cos mu sin d over rows row to row + ROWS - 1
    for each of PAIRS d, then sum cos mu, sin mu: 4 PAIRS + 2 tensors [WIDE, COLUMNS].
    """
    high, low = turns[2], turns[3]
    for later in tl.static_range(1, MOST_CHUNKS):
        high = tl.where(chunk == later, turns[2 + 2 * later], high)
        low = tl.where(chunk == later, turns[3 + 2 * later], low)
    sums = (tl.zeros((WIDE, COLUMNS), tl.float32),) * (4 * PAIRS + 2)
    for start in range(0, ROWS, WIDE):
        n = row + start + tl.arange(0, WIDE)
        live = (n < last)[:, None] & (column < slices)[None, :]
        at = projections + n.to(tl.int64)[:, None] * slices + column[None, :]
        p = tl.load(at, mask=live, other=0.0)
        first_c, first_s = circle(p, turns[0], turns[1])
        step_c, step_s = first_c, first_s
        if HALF:
            step_c, step_s = twice(first_c, first_s)
        c, s = first_c, first_s
        cosines, sines = (c,), (s,)
        for _ in tl.static_range(1, PAIRS):
            c, s = rotate(c, s, step_c, step_s)
            cosines, sines = cosines + (c,), sines + (s,)
        if HALF:
            c, s = rotate(c, s, first_c, first_s)
        if chunk > 0:
            c, s = circle(p, high, low)
        mu_c = tl.where(live, c, 0.0)
        mu_s = tl.where(live, s, 0.0)
        new = ()
        for j in tl.static_range(PAIRS):
            new = new + (
                tl.fma(mu_c, cosines[j], sums[4 * j]),
                tl.fma(mu_s, sines[j], sums[4 * j + 1]),
                tl.fma(mu_s, cosines[j], sums[4 * j + 2]),
                tl.fma(mu_c, sines[j], sums[4 * j + 3]),
            )
        sums = new + (sums[4 * PAIRS] + mu_c, sums[4 * PAIRS + 1] + mu_s)
    return sums


@triton.jit
def single_sums(
    projections, row, last, column, slices, first, turns,
    ROWS: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sum cos, sum sin over the rows for knots first to first + SINGLES - 1, a sincos each."""
    highs, lows = (), ()
    for k in tl.static_range(SINGLES):
        high, low = turns[2 * k], turns[2 * k + 1]
        for later in tl.static_range(SINGLES, MOST_KNOTS, SINGLES):
            high = tl.where(first == later, turns[2 * (later + k)], high)
            low = tl.where(first == later, turns[2 * (later + k) + 1], low)
        highs, lows = highs + (high,), lows + (low,)
    sums = (tl.zeros((WIDE, COLUMNS), tl.float32),) * (2 * SINGLES)
    for start in range(0, ROWS, WIDE):
        n = row + start + tl.arange(0, WIDE)
        live = (n < last)[:, None] & (column < slices)[None, :]
        at = projections + n.to(tl.int64)[:, None] * slices + column[None, :]
        p = tl.load(at, mask=live, other=0.0)
        one = live.to(tl.float32)
        new = ()
        for k in tl.static_range(SINGLES):
            c, s = circle(p, highs[k], lows[k])
            new = new + (tl.fma(c, one, sums[2 * k]), sums[2 * k + 1] + s)
        sums = new
    return sums


@triton.jit
def store_sums(out, k, cosine, sine, column, slices, knots):
    """out: [2, knots, slices] of one group and row block; cosine, sine: of knot k, if it exists."""
    live = column < tl.where(k < knots, slices, 0)
    at = out + tl.cast(k, tl.int64) * slices + column
    tl.store(at, cosine, mask=live)
    tl.store(at + tl.cast(knots, tl.int64) * slices, sine, mask=live)


@triton.jit
def paired_chunk(
    out, projections, row, last, column, slices, knots, chunk, turns,
    ROWS: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The sums of the chunk's 2 PAIRS knots over the row block, into out [2, knots, slices]."""
    sums = paired_sums(
        projections, row, last, column, slices, chunk, turns, ROWS, WIDE, COLUMNS, PAIRS, HALF
    )
    middle = (2 * chunk + 1) * PAIRS
    for k in tl.static_range(PAIRS):
        both = tl.join(sums[4 * k], sums[4 * k + 1])
        both = tl.join(both, tl.join(sums[4 * k + 2], sums[4 * k + 3]))
        cosines, sines = tl.split(tl.sum(both, axis=0))  # four sums meet at a barrier once
        cc, ss = tl.split(cosines)
        sc, cs = tl.split(sines)
        store_sums(out, middle + k, cc - ss, sc + cs, column, slices, knots)
        if HALF:
            store_sums(out, middle - 1 - k, cc + ss, sc - cs, column, slices, knots)
        elif k < PAIRS - 1:
            store_sums(out, middle - 2 - k, cc + ss, sc - cs, column, slices, knots)
        else:  # mu - d is the last knot of the chunk before, or 0
            cosine = tl.sum(sums[4 * PAIRS], axis=0)
            sine = tl.sum(sums[4 * PAIRS + 1], axis=0)
            store_sums(out, middle - 1, cosine, sine, column, slices, knots)


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    z, directions, projections, out, done,
    groups, rows, dim, slices, row_blocks, knots, chunks, s_g, s_n, s_d, a_d, a_m, turns,
    PAIRS: tl.constexpr, HALF: tl.constexpr, MANY: tl.constexpr, UNIT: tl.constexpr,
    FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of the projections of one group, and its column sums into out
    [row blocks, G, 2, K, M]. turns: as launchers' Knots; PAIRS = 0: knots of any spacing.
    """
    if tl.program_id(0) == 0:
        tl.store(done, 0)  # what statistic_kernel counts its programs in
    dim *= UNIT
    slices *= UNIT
    s_g = tl.cast(s_g, tl.int64) * UNIT
    s_n = tl.cast(s_n, tl.int64) * UNIT
    a_d = tl.cast(a_d, tl.int64) * UNIT
    if UNIT > 1:
        s_d, a_m = 1, 1
    across = tl.cdiv(slices, COLUMNS)
    j = tl.program_id(0) % across
    i = (tl.program_id(0) // across) % row_blocks
    g = (tl.program_id(0) // (across * row_blocks)).to(tl.int64)
    row = i * ROWS + tl.arange(0, ROWS)
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    some_rows = (row < rows)[:, None]
    some_columns = (column < slices)[None, :]
    z_ptr = z + g * s_g + row.to(tl.int64)[:, None] * s_n
    a_ptr = directions + column.to(tl.int64)[None, :] * a_m
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, dim, DEPTH):
        d = start + tl.arange(0, DEPTH)
        wide = d.to(tl.int64)
        inside = d < dim
        left = tl.load(z_ptr + wide[None, :] * s_d, mask=some_rows & inside[None, :], other=0.0)
        right = tl.load(a_ptr + wide[:, None] * a_d, mask=inside[:, None] & some_columns, other=0.0)
        left = operand(left, FORMAT)
        right = operand(right, FORMAT)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)

    own = projections + g * rows * slices
    at = own + row.to(tl.int64)[:, None] * slices + column[None, :]
    tl.store(at, acc, mask=some_rows & some_columns)
    tl.debug_barrier()  # what other threads of the program wrote is read back below
    out += (i.to(tl.int64) * groups + g) * 2 * knots * slices
    if PAIRS == 0:
        for first in range(0, knots, SINGLES):
            sums = single_sums(
                own, i * ROWS, rows, column, slices, first, turns, ROWS, WIDE, COLUMNS
            )
            for k in tl.static_range(SINGLES):
                cosine = tl.sum(sums[2 * k], axis=0)
                sine = tl.sum(sums[2 * k + 1], axis=0)
                store_sums(out, first + k, cosine, sine, column, slices, knots)
    else:
        paired_chunk(
            out, own, i * ROWS, rows, column, slices, knots, 0, turns,
            ROWS, WIDE, COLUMNS, PAIRS, HALF,
        )  # fmt: skip
        if MANY:
            for chunk in range(1, chunks):
                paired_chunk(
                    out, own, i * ROWS, rows, column, slices, knots, chunk, turns,
                    ROWS, WIDE, COLUMNS, PAIRS, HALF,
                )  # fmt: skip
