"""Column statistics of the VICReg op in Triton: one or two stages, partial rows, no atomics.

A plane is one view of one group; planes are numbered view * groups + group. GPU times: not measured
yet.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.core.triton.columns import merge, welford
from vicreg_kernels.core.triton.operands import value


@triton.jit
def finish_columns(
    pivot, deviation, scatter, used, plane, block, blocks, columns, dim, degrees, margin, eps,
    moments, hinges, candidates, candidate_index,
    GRAM: tl.constexpr,
):  # fmt: skip
    """Store one block of columns of one plane: moments (the mean as pivot + deviation, which keeps
    its low digits under a large offset; the scatter), hinge sum and, for the Gram side, the four
    columns of largest scatter and the sum of the other columns' squared variances.

    used: the scatter of the products' values. A NaN ranks as infinite; ties go to the lowest.
    candidates: [planes, blocks, 5] of variances, candidate_index: [planes, blocks, 4], -1 for none.
    """
    inside = columns < dim
    at = moments + plane.to(tl.int64) * 3 * dim + columns
    tl.store(at, pivot, mask=inside)
    tl.store(at + dim, deviation, mask=inside)
    tl.store(at + 2 * dim, scatter, mask=inside)
    gap = margin - tl.sqrt(scatter / degrees + eps)
    hinge = tl.where(inside, tl.where(gap <= 0.0, 0.0, gap), 0.0)  # a NaN passes
    slot = plane.to(tl.int64) * blocks + block
    tl.store(hinges + slot, tl.sum(hinge, axis=0).to(tl.float64))
    if GRAM:
        variance = used / degrees
        key = tl.where(variance == variance, variance, float("inf"))
        key = tl.where(inside, key, -1.0)
        for k in tl.static_range(4):
            top = tl.max(key, axis=0)
            chosen = tl.min(tl.where(key == top, columns, 2147483647), axis=0)
            tl.store(candidates + slot * 5 + k, top)
            tl.store(candidate_index + slot * 4 + k, tl.where(top < 0.0, -1, chosen))
            key = tl.where(columns == chosen, -1.0, key)
        rest = tl.where(key < 0.0, 0.0, key)
        tl.store(candidates + slot * 5 + 4, tl.sum(rest * rest, axis=0))


@triton.jit
def used_scatter(
    z_ptr, columns, inside, pivot, deviation, rows, stride_n,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum of squares of the values a product uses, z_ptr: [COLUMNS] at row 0; the rows were just
    read, so they come from the L2 cache.
    """
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for n in range(0, rows, ROWS):
        row = n + tl.arange(0, ROWS)
        keep = (row < rows)[:, None] & inside[None, :]
        at = z_ptr[None, :] + row.to(tl.int64)[:, None] * stride_n
        z = tl.load(at, mask=keep, other=0.0).to(tl.float32)
        centred = (z - pivot[None, :]) - deviation[None, :]
        used = value(tl.where(keep, centred, 0.0), FORMAT)
        acc += used * used
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["groups", "rows", "row_blocks", "block_rows"])
def statistics_kernel(
    x, y, moments, partials, hinges, differences, candidates, candidate_index,
    groups, rows, dim, row_blocks, block_rows,
    sx_g, sx_n, sx_d, sy_g, sy_n, sy_d,
    degrees, margin, eps,
    VIEWS: tl.constexpr, GRAM: tl.constexpr, FINAL: tl.constexpr, FORMAT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stage 1: mean and scatter of COLUMNS columns over block_rows rows of both views, and their
    sum of (x - y)^2. FINAL (one row block): stage 2 as well.

    Reads 2 N D elements once, 11 operations each, and writes 8 D row_blocks bytes a view: bound by
    bandwidth. Running means per row slot, so that threads meet once a block and not once a tile;
    shifted by row 0, so that a large common offset or a constant column costs no digits. Rounded
    operands (Gram side, FINAL): a second read, from L2, for the scatter of the rounded values.
    """
    degrees = tl.cast(degrees, tl.float32)
    margin = tl.cast(margin, tl.float32)
    eps = tl.cast(eps, tl.float32)
    blocks = tl.cdiv(dim, COLUMNS)
    block = tl.program_id(0) % blocks
    r = (tl.program_id(0) // blocks) % row_blocks
    group = tl.program_id(0) // (blocks * row_blocks)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < dim
    g = group.to(tl.int64)
    x_ptr = x + g * sx_g + columns.to(tl.int64) * sx_d
    y_ptr = y + g * sy_g + columns.to(tl.int64) * sy_d
    x_pivot = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    y_pivot = tl.load(y_ptr, mask=inside, other=0.0).to(tl.float32)

    count = tl.zeros((ROWS, 1), tl.float32)
    x_mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    x_scatter = tl.zeros((ROWS, COLUMNS), tl.float32)
    y_mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    y_scatter = tl.zeros((ROWS, COLUMNS), tl.float32)
    difference = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.multiple_of(r * block_rows, ROWS)  # one block, or blocks of whole tiles
    last = tl.minimum(first + block_rows, rows)
    for n in range(first, last, ROWS):
        row = n + tl.arange(0, ROWS)
        live = (row < last)[:, None]
        keep = live & inside[None, :]
        count += live.to(tl.float32)
        filled = tl.maximum(count, 1.0)
        offset = row.to(tl.int64)[:, None]
        a = tl.load(x_ptr[None, :] + offset * sx_n, mask=keep, other=0.0).to(tl.float32)
        x_mean, x_scatter = welford(a, x_pivot[None, :], keep, filled, x_mean, x_scatter)
        if VIEWS == 2:
            b = tl.load(y_ptr[None, :] + offset * sy_n, mask=keep, other=0.0).to(tl.float32)
            y_mean, y_scatter = welford(b, y_pivot[None, :], keep, filled, y_mean, y_scatter)
            difference += (a - b) * (a - b)

    total = (last - first).to(tl.float32)
    a_mean, a_scatter = merge(count, x_mean, x_scatter, total)
    b_mean, b_scatter = merge(count, y_mean, y_scatter, total)
    if VIEWS == 2:
        tl.store(differences + tl.program_id(0), tl.sum(difference).to(tl.float64))
    if FINAL:
        ROUNDED: tl.constexpr = GRAM and FORMAT != "fp32"
        used = a_scatter
        if ROUNDED:
            used = used_scatter(
                x_ptr, columns, inside, x_pivot, a_mean, rows, sx_n, FORMAT, ROWS, COLUMNS
            )  # fmt: skip
        finish_columns(
            x_pivot, a_mean, a_scatter, used, group, block, blocks, columns, dim,
            degrees, margin, eps, moments, hinges, candidates, candidate_index, GRAM,
        )  # fmt: skip
        if VIEWS == 2:
            used = b_scatter
            if ROUNDED:
                used = used_scatter(
                    y_ptr, columns, inside, y_pivot, b_mean, rows, sy_n, FORMAT, ROWS, COLUMNS
                )  # fmt: skip
            finish_columns(
                y_pivot, b_mean, b_scatter, used, groups + group, block, blocks, columns, dim,
                degrees, margin, eps, moments, hinges, candidates, candidate_index, GRAM,
            )  # fmt: skip
    else:
        at = partials + (g * row_blocks + r) * 2 * dim + columns
        tl.store(at, a_mean, mask=inside)
        tl.store(at + dim, a_scatter, mask=inside)
        if VIEWS == 2:
            at += tl.cast(groups, tl.int64) * row_blocks * 2 * dim
            tl.store(at, b_mean, mask=inside)
            tl.store(at + dim, b_scatter, mask=inside)


@triton.jit(do_not_specialize=["groups", "rows", "row_blocks", "block_rows"])
def merge_kernel(
    x, y, moments, partials, hinges, candidates, candidate_index,
    groups, rows, dim, row_blocks, block_rows,
    sx_g, sx_d, sy_g, sy_d,
    degrees, margin, eps,
    GRAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stage 2: the row blocks' partials of one plane as one, 16 D row_blocks bytes read a view."""
    degrees = tl.cast(degrees, tl.float32)
    margin = tl.cast(margin, tl.float32)
    eps = tl.cast(eps, tl.float32)
    blocks = tl.cdiv(dim, COLUMNS)
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    g = (plane % groups).to(tl.int64)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < dim
    wide = columns.to(tl.int64)
    pointer = tl.where(plane < groups, x + g * sx_g, y + g * sy_g)
    stride = tl.where(plane < groups, sx_d, sy_d)
    pivot = tl.load(pointer + wide * stride, mask=inside, other=0.0).to(tl.float32)
    at = partials + plane.to(tl.int64) * row_blocks * 2 * dim + columns

    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, row_blocks, ROWS):
        r = first + tl.arange(0, ROWS)
        keep = (r < row_blocks)[:, None] & inside[None, :]
        count = tl.minimum(block_rows, rows - r * block_rows).to(tl.float32)
        mean = tl.load(at[None, :] + r.to(tl.int64)[:, None] * 2 * dim, mask=keep, other=0.0)
        acc += tl.where(keep, count[:, None] * mean, 0.0)
    whole = tl.sum(acc, axis=0) / tl.cast(rows, tl.float32)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, row_blocks, ROWS):
        r = first + tl.arange(0, ROWS)
        keep = (r < row_blocks)[:, None] & inside[None, :]
        count = tl.minimum(block_rows, rows - r * block_rows).to(tl.float32)
        here = at[None, :] + r.to(tl.int64)[:, None] * 2 * dim
        shift = tl.load(here, mask=keep, other=0.0) - whole[None, :]
        part = tl.load(here + dim, mask=keep, other=0.0)
        acc += tl.where(keep, part + count[:, None] * shift * shift, 0.0)
    scatter = tl.sum(acc, axis=0)
    finish_columns(
        pivot, whole, scatter, scatter, plane, block, blocks, columns, dim, degrees, margin, eps,
        moments, hinges, candidates, candidate_index, GRAM,
    )  # fmt: skip
