"""The squared differences of the kept matches in Triton, and their gradient.

With K kept matches and e bytes an element, forward reads 2 e K D bytes and does 2 K D operations.
Backward a program owns one position of one map, finds the matches that name it and writes its row
once, in a fixed order: for each view of the other side its own match, then those that name it,
ascending. Each match is read by both its ends, beside their own rows: 2 e K D and e B D (U L1 +
V L2) bytes, as many as the latter are written. GPU times: not measured yet.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.core.triton.operands import round_if
from vicreg_kernels.vicregl.triton.match import SIZES, strides_of


@triton.jit
def factor_of(rank, c0, c1, c2, c3, f0, f1, f2, f3):
    """The sum of the factors of the sets that keep a match of this rank; sets left out have 0."""
    total = tl.where(rank < c0, tl.cast(f0, tl.float32), 0.0)
    total += tl.where(rank < c1, tl.cast(f1, tl.float32), 0.0)
    total += tl.where(rank < c2, tl.cast(f2, tl.float32), 0.0)
    return total + tl.where(rank < c3, tl.cast(f3, tl.float32), 0.0)


@triton.jit
def followed(position, rows, factor):
    """An index out of range is not followed: it gives NaN."""
    valid = (position >= 0) & (position < rows)
    return tl.where(valid, position, 0).to(tl.int64), tl.where(valid, factor, float("nan"))


@triton.jit
def side_sum(
    total, own, other, nearest, rank, samples, batch, views_b, own_rows, other_rows, dim,
    so_v, so_n, so_l, so_c, st_v, st_n, st_l, st_c,
    most, c0, c1, c2, c3, f0, f1, f2, f3, SWAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total [BLOCK] plus the program's share of one direction. SWAPPED: own is b."""
    column = tl.arange(0, BLOCK)
    for r in range(tl.program_id(0), samples * own_rows, tl.num_programs(0)):
        row = tl.cast(r, tl.int64)
        place = tl.load(rank + row)
        factor = factor_of(place, c0, c1, c2, c3, f0, f1, f2, f3)
        position, factor = followed(tl.load(nearest + row), other_rows, factor)
        s = row // own_rows
        n = s % batch
        u = s // batch // views_b
        v = s // batch % views_b
        x_at = own + (v if SWAPPED else u) * so_v + n * so_n + (row % own_rows) * so_l
        y_at = other + (u if SWAPPED else v) * st_v + n * st_n + position * st_l
        for first in range(0, tl.where(place < most, dim, 0), BLOCK):
            c = (first + column).to(tl.int64)
            inside = c < dim
            x = tl.load(x_at + c * so_c, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_at + c * st_c, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(inside, factor * ((x - y) * (x - y)), 0.0)
    return total


@triton.jit(do_not_specialize=SIZES)
def pairs_kernel(
    a, b, nearest_a, rank_a, nearest_b, rank_b, partials,
    samples, batch, views_b, rows_a, rows_b, dim,
    sa_v, sa_n, sa_l, sa_c, sb_v, sb_n, sb_l, sb_c,
    a_most, a_c0, a_c1, a_c2, a_c3, a_f0, a_f1, a_f2, a_f3,
    b_most, b_c0, b_c1, b_c2, b_c3, b_f0, b_f1, b_f2, b_f3,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[program] = the sum of its positions of a, then of b."""
    dim *= UNIT
    sa_v, sa_n, sa_l, sa_c = strides_of(sa_v, sa_n, sa_l, sa_c, UNIT)
    sb_v, sb_n, sb_l, sb_c = strides_of(sb_v, sb_n, sb_l, sb_c, UNIT)
    total = tl.zeros((BLOCK,), tl.float32)
    total = side_sum(
        total, a, b, nearest_a, rank_a, samples, batch, views_b, rows_a, rows_b, dim,
        sa_v, sa_n, sa_l, sa_c, sb_v, sb_n, sb_l, sb_c,
        a_most, a_c0, a_c1, a_c2, a_c3, a_f0, a_f1, a_f2, a_f3, False, BLOCK,
    )  # fmt: skip
    total = side_sum(
        total, b, a, nearest_b, rank_b, samples, batch, views_b, rows_b, rows_a, dim,
        sb_v, sb_n, sb_l, sb_c, sa_v, sa_n, sa_l, sa_c,
        b_most, b_c0, b_c1, b_c2, b_c3, b_f0, b_f1, b_f2, b_f3, True, BLOCK,
    )  # fmt: skip
    tl.store(partials + tl.program_id(0), tl.sum(total.to(tl.float64), axis=0))


@triton.jit
def difference(x_at, y_at, c, inside, stride_x, stride_y):
    x = tl.load(x_at + c * stride_x, mask=inside, other=0.0).to(tl.float32)
    return x - tl.load(y_at + c * stride_y, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def side_gradient(
    grad, own, other, nearest, rank, named, named_rank, out, row, block,
    batch, own_step, other_step, other_views, own_rows, other_rows, dim,
    so_v, so_n, so_l, so_c, st_v, st_n, st_l, st_c,
    most, c0, c1, c2, c3, f0, f1, f2, f3,
    n_most, n_c0, n_c1, n_c2, n_c3, n_f0, n_f1, n_f2, n_f3,
    ROUND: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of channels of row `row` of out [own views, B, own rows, D]. The pair of views (own
    x, other y) is number x own_step + y other_step; named: the other side's nearest positions.
    """
    c = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = c < dim
    twice = 2.0 * tl.load(grad)
    position = row % own_rows
    n = row // own_rows % batch
    x = row // own_rows // batch
    x_at = own + x * so_v + n * so_n + position * so_l
    total = tl.zeros((BLOCK,), tl.float32)
    for y in range(0, other_views):
        s = (x * own_step + tl.cast(y, tl.int64) * other_step) * batch + n
        y_at = other + tl.cast(y, tl.int64) * st_v + n * st_n
        at = s * own_rows + position
        place = tl.load(rank + at)
        if place < most:
            factor = factor_of(place, c0, c1, c2, c3, f0, f1, f2, f3)
            to, factor = followed(tl.load(nearest + at), other_rows, factor)
            total += (twice * factor) * difference(x_at, y_at + to * st_l, c, inside, so_c, st_c)
        others = s * other_rows
        for first in range(0, other_rows, WIDTH):
            j = first + tl.arange(0, WIDTH)
            live = j < other_rows
            here = tl.load(named + others + j, mask=live, other=-1) == position
            here = here & (tl.load(named_rank + others + j, mask=live, other=0) < n_most)
            following = tl.min(tl.where(here, j, 2147483647), axis=0)
            while following < 2147483647:
                to = tl.cast(following, tl.int64)
                place = tl.load(named_rank + others + to)
                factor = factor_of(place, n_c0, n_c1, n_c2, n_c3, n_f0, n_f1, n_f2, n_f3)
                change = difference(x_at, y_at + to * st_l, c, inside, so_c, st_c)
                total += (twice * factor) * change
                following = tl.min(tl.where(here & (j > following), j, 2147483647), axis=0)
    tl.store(out + row * dim + c, round_if(total, out, ROUND), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def pairs_gradient_kernel(
    grad, a, b, nearest_a, rank_a, nearest_b, rank_b, out_a, out_b,
    count_a, blocks, batch, views_a, views_b, rows_a, rows_b, dim,
    sa_v, sa_n, sa_l, sa_c, sb_v, sb_n, sb_l, sb_c,
    a_most, a_c0, a_c1, a_c2, a_c3, a_f0, a_f1, a_f2, a_f3,
    b_most, b_c0, b_c1, b_c2, b_c3, b_f0, b_f1, b_f2, b_f3,
    ROUND: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a block of channels of a position: the count_a of a, then those of b."""
    dim *= UNIT
    sa_v, sa_n, sa_l, sa_c = strides_of(sa_v, sa_n, sa_l, sa_c, UNIT)
    sb_v, sb_n, sb_l, sb_c = strides_of(sb_v, sb_n, sb_l, sb_c, UNIT)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if row < count_a:
        side_gradient(
            grad, a, b, nearest_a, rank_a, nearest_b, rank_b, out_a, row, block,
            batch, views_b, 1, views_b, rows_a, rows_b, dim,
            sa_v, sa_n, sa_l, sa_c, sb_v, sb_n, sb_l, sb_c,
            a_most, a_c0, a_c1, a_c2, a_c3, a_f0, a_f1, a_f2, a_f3,
            b_most, b_c0, b_c1, b_c2, b_c3, b_f0, b_f1, b_f2, b_f3, ROUND, WIDTH, BLOCK,
        )  # fmt: skip
    else:
        side_gradient(
            grad, b, a, nearest_b, rank_b, nearest_a, rank_a, out_b, row - count_a, block,
            batch, 1, views_b, views_a, rows_b, rows_a, dim,
            sb_v, sb_n, sb_l, sb_c, sa_v, sa_n, sa_l, sa_c,
            b_most, b_c0, b_c1, b_c2, b_c3, b_f0, b_f1, b_f2, b_f3,
            a_most, a_c0, a_c1, a_c2, a_c3, a_f0, a_f1, a_f2, a_f3, ROUND, WIDTH, BLOCK,
        )  # fmt: skip
