"""The forward products of the Barlow Twins op in Triton, and the loss.

Views are standardised as their tiles are loaded, so that no standardised copy is stored. Every
reduction runs in a fixed order. GPU times: not measured yet.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.barlow.triton.statistics import load_scale
from vicreg_kernels.core.triton.columns import triangle
from vicreg_kernels.core.triton.operands import operand
from vicreg_kernels.core.triton.sums import total


@triton.jit
def store_symmetric(base, tile, a_row, b_row, rows, mirrored):
    valid = (a_row < rows)[:, None] & (b_row < rows)[None, :]
    at = base + a_row.to(tl.int64)[:, None] * rows + b_row[None, :]
    tl.store(at, tile, mask=valid)
    if mirrored:
        mirror = base + b_row.to(tl.int64)[:, None] * rows + a_row[None, :]
        tl.store(mirror, tl.trans(tile), mask=tl.trans(valid))


@triton.jit(do_not_specialize=["splits"])
def gram_kernel(
    x, y, moments, out,
    rows, dim, splits, chunk,
    sx_n, sx_d, sy_n, sy_d,
    degrees, eps, std_eps,
    WHOLE: tl.constexpr, FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """N < D: one tile (i <= j) of one view's Gram matrix over one chunk of the columns, into out
    [2, splits, N, N]; WHOLE (one chunk): its mirror image too.

    2 N^2 D operations over both views, half of the full products'; a tile reads 2 TILE chunk
    elements and writes at most 8 TILE^2 bytes. Splits fill the GPU where tiles are few. A program
    with the tiles of both views, whose inner product would be its own, spills at 128 x 128; reading
    them again costs `combine_kernel` 4 N^2 bytes of L2.
    """
    degrees = tl.cast(degrees, tl.float32)
    eps = tl.cast(eps, tl.float32)
    std_eps = tl.cast(std_eps, tl.float32)
    across = tl.cdiv(rows, TILE)
    tiles = across * (across + 1) // 2
    t = tl.program_id(0) % tiles
    split = (tl.program_id(0) // tiles) % splits
    view = tl.program_id(0) // (tiles * splits)
    i, j = triangle(t)
    z = tl.where(view == 0, x, y)
    s_n = tl.where(view == 0, sx_n, sy_n).to(tl.int64)
    s_d = tl.where(view == 0, sx_d, sy_d).to(tl.int64)
    mean_ptr = moments + view * 3 * dim

    # Past the edge zeros are read, and standardised: what comes of them is never stored.
    a_row = i * TILE + tl.arange(0, TILE)
    b_row = j * TILE + tl.arange(0, TILE)
    a_live = (a_row < rows)[:, None]
    b_live = (b_row < rows)[:, None]
    a_ptr = z + a_row.to(tl.int64)[:, None] * s_n
    b_ptr = z + b_row.to(tl.int64)[:, None] * s_n
    acc = tl.zeros((TILE, TILE), tl.float32)
    first = split * chunk
    last = tl.minimum(first + chunk, dim)
    for start in range(first, last, DEPTH):
        r = start + tl.arange(0, DEPTH)
        inside = r < last
        along = r.to(tl.int64)[None, :] * s_d
        some = inside[None, :]
        a = tl.load(a_ptr + along, mask=a_live & some, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + along, mask=b_live & some, other=0.0).to(tl.float32)
        origin, offset, scale = load_scale(mean_ptr, dim, r, inside, degrees, eps, std_eps)
        a = tl.where(some, ((a - origin[None, :]) - offset[None, :]) * scale[None, :], 0.0)
        b = tl.where(some, ((b - origin[None, :]) - offset[None, :]) * scale[None, :], 0.0)
        a = operand(a, FORMAT)
        b = operand(b, FORMAT)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    if FORMAT == "fp16":
        acc *= 4.0
    base = out + (view * splits + split) * tl.cast(rows, tl.int64) * rows
    store_symmetric(base, acc, a_row, b_row, rows, (i != j) & WHOLE)


@triton.jit(do_not_specialize=["rows", "splits"])
def cross_kernel(
    x, y, moments, out, sums,
    rows, dim, splits, chunk,
    sx_n, sx_d, sy_n, sy_d,
    degrees, eps, std_eps,
    WHOLE: tl.constexpr, FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """N >= D: one tile of C over one chunk of the rows; WHOLE (one chunk): with its zero diagonal
    into out [1, D, D], and the sum of its squares. Else into out [splits, D, D].

    2 N D^2 operations; a tile reads 2 TILE chunk elements and writes 4 TILE^2 bytes.
    """
    degrees = tl.cast(degrees, tl.float32)
    eps = tl.cast(eps, tl.float32)
    std_eps = tl.cast(std_eps, tl.float32)
    across = tl.cdiv(dim, TILE)
    tiles = across * across
    t = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles
    a_column = (t // across) * TILE + tl.arange(0, TILE)
    b_column = (t % across) * TILE + tl.arange(0, TILE)
    a_live = a_column < dim
    b_live = b_column < dim
    a_origin, a_offset, a_scale = load_scale(moments, dim, a_column, a_live, degrees, eps, std_eps)
    b_origin, b_offset, b_scale = load_scale(
        moments + 3 * dim, dim, b_column, b_live, degrees, eps, std_eps
    )
    a_ptr = x + a_column.to(tl.int64)[:, None] * sx_d
    b_ptr = y + b_column.to(tl.int64)[:, None] * sy_d
    acc = tl.zeros((TILE, TILE), tl.float32)
    first = split * chunk
    last = tl.minimum(first + chunk, rows)
    for start in range(first, last, DEPTH):
        r = start + tl.arange(0, DEPTH)
        some = (r < last)[None, :]
        wide = r.to(tl.int64)[None, :]
        a = tl.load(a_ptr + wide * sx_n, mask=a_live[:, None] & some, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + wide * sy_n, mask=b_live[:, None] & some, other=0.0).to(tl.float32)
        a = tl.where(some, ((a - a_origin[:, None]) - a_offset[:, None]) * a_scale[:, None], 0.0)
        b = tl.where(some, ((b - b_origin[:, None]) - b_offset[:, None]) * b_scale[:, None], 0.0)
        a = operand(a, FORMAT)
        b = operand(b, FORMAT)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    if FORMAT == "fp16":
        acc *= 4.0
    valid = a_live[:, None] & b_live[None, :]
    at = a_column.to(tl.int64)[:, None] * dim + b_column[None, :]
    if WHOLE:
        acc = tl.where(a_column[:, None] == b_column[None, :], 0.0, acc / rows)
        c = tl.where(valid, acc, 0.0)
        tl.store(sums + t, tl.sum(c * c).to(tl.float64))
        tl.store(out + at, acc, mask=valid)
    else:
        area = tl.cast(dim, tl.int64) * dim
        tl.store(out + split * area + at, acc, mask=valid)


@triton.jit
def add_splits(parts, area, splits, at, valid, TILE: tl.constexpr, EACH: tl.constexpr):
    acc = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, splits, EACH):
        s = first + tl.arange(0, EACH)
        here = parts + (s.to(tl.int64) * area)[:, None, None] + at[None, :, :]
        some = (s < splits)[:, None, None] & valid[None, :, :]
        acc += tl.sum(tl.load(here, mask=some, other=0.0), axis=0)
    return acc


@triton.jit(do_not_specialize=["splits", "rows"])
def combine_kernel(
    parts, products, sums,
    side, splits, rows,
    GRAM: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """One tile of the square matrices: adds the splits, stores, sums.

    GRAM: a tile (i <= j) of both views, its mirror images and its part of the inner product; the
    tiles of `gram_kernel`, which these divide, hold the upper triangle. WHOLE (one split): parts
    are the products themselves, and nothing is stored. Else a tile of C, as WHOLE in
    `cross_kernel`. Reads 4 splits bytes an element, and writes 4, from and to L2 at most sizes.
    """
    across = tl.cdiv(side, TILE)
    t = tl.program_id(0)
    area = tl.cast(side, tl.int64) * side
    if GRAM:
        i, j = triangle(t)
    else:
        i = t // across
        j = t % across
    a = i * TILE + tl.arange(0, TILE)
    b = j * TILE + tl.arange(0, TILE)
    valid = (a < side)[:, None] & (b < side)[None, :]
    at = a.to(tl.int64)[:, None] * side + b[None, :]
    if GRAM:
        kx = add_splits(parts, area, splits, at, valid, TILE, EACH)
        ky = add_splits(parts + splits * area, area, splits, at, valid, TILE, EACH)
        twice = tl.where(i == j, 1.0, 2.0)
        tl.store(sums + t, (twice * tl.sum(kx * ky)).to(tl.float64))
        if not WHOLE:
            store_symmetric(products, kx, a, b, side, i != j)
            store_symmetric(products + area, ky, a, b, side, i != j)
    else:
        c = add_splits(parts, area, splits, at, valid, TILE, EACH)
        c = tl.where(a[:, None] == b[None, :], 0.0, c / rows)
        tl.store(sums + t, tl.sum(c * c).to(tl.float64))
        tl.store(products + at, c, mask=valid)


@triton.jit(do_not_specialize=["column_count", "sum_count"])
def loss_kernel(
    loss, invariances, taken, sums, column_count, sum_count, factor,
    GRAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss from the partial sums; one program, a few thousand numbers."""
    off_diagonal = total(sums, sum_count, BLOCK)
    if GRAM:
        off_diagonal -= total(taken, column_count, BLOCK)
    answer = total(invariances, column_count, BLOCK)
    answer += tl.cast(factor, tl.float32) * off_diagonal
    tl.store(loss, answer.to(tl.float32))
