"""Column statistics of both views in Triton: one or two stages, partial rows, no atomics.

GPU times: not measured yet.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.core.triton.columns import load_mean, merge, welford
from vicreg_kernels.core.triton.operands import value


@triton.jit
def representable(scatter, degrees, eps, std_eps):
    """The scatter; NaN where float32 does not hold the sum of squares, as in formula.h. Whatever is
    computed from the stored one is then NaN too, without a check in the loops that load it.
    """
    variance = scatter / degrees + eps
    # Infinity less itself is NaN.
    return tl.where(
        variance + std_eps >= 1.17549435e-38, scatter + (variance - variance), float("nan")
    )


@triton.jit
def inverse_std(scatter, degrees, eps, std_eps):
    return 1.0 / (tl.sqrt(scatter / degrees + eps) + std_eps)


@triton.jit
def load_scale(moments, dim, columns, mask, degrees, eps, std_eps):
    """The two parts of the columns' mean and what standardises them; moments: [3, dim]."""
    origin, offset = load_mean(moments, dim, columns, mask)
    scatter = tl.load(moments + 2 * dim + columns, mask=mask, other=1.0)
    return origin, offset, inverse_std(scatter, degrees, eps, std_eps)


@triton.jit
def store_moments(moments, dim, columns, inside, pivot, deviation, scatter):
    tl.store(moments + columns, pivot, mask=inside)
    tl.store(moments + dim + columns, deviation, mask=inside)
    tl.store(moments + 2 * dim + columns, scatter, mask=inside)


@triton.jit
def finish_columns(
    x_pivot, x_mean, x_scatter, y_pivot, y_mean, y_scatter, comoment, block, columns, rows, dim,
    degrees, eps, std_eps, moments, diagonal, invariances,
):  # fmt: skip
    """Store one block of columns: moments (the mean as pivot + deviation, which keeps its low
    digits under a large offset; the scatter), C_jj, the sum of (C_jj - 1)^2. Returns N C_jj.
    """
    inside = columns < dim
    x_scatter = representable(x_scatter, degrees, eps, std_eps)
    y_scatter = representable(y_scatter, degrees, eps, std_eps)
    store_moments(moments, dim, columns, inside, x_pivot, x_mean, x_scatter)
    store_moments(moments + 3 * dim, dim, columns, inside, y_pivot, y_mean, y_scatter)
    product = comoment * inverse_std(x_scatter, degrees, eps, std_eps)
    product *= inverse_std(y_scatter, degrees, eps, std_eps)
    c = product / tl.cast(rows, tl.float32)
    tl.store(diagonal + columns, c, mask=inside)
    gap = tl.where(inside, c - 1.0, 0.0)
    tl.store(invariances + block, tl.sum((gap * gap).to(tl.float64), axis=0))
    return product


@triton.jit
def store_taken(taken, block, product, inside):
    """The sum of (N C_jj)^2 that comes off the Gram matrices' inner product."""
    product = tl.where(inside, product, 0.0).to(tl.float64)
    tl.store(taken + block, tl.sum(product * product, axis=0))


@triton.jit
def rounded_product(
    x_ptr, y_ptr, inside, x_pivot, x_mean, x_inverse, y_pivot, y_mean, y_inverse, rows, sx_n, sy_n,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """N C_jj of the values a product multiplies, x_ptr, y_ptr: [COLUMNS] at row 0; the rows were
    just read, so they come from the L2 cache.
    """
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for n in range(0, rows, ROWS):
        row = n + tl.arange(0, ROWS)
        keep = (row < rows)[:, None] & inside[None, :]
        wide = row.to(tl.int64)[:, None]
        a = tl.load(x_ptr[None, :] + wide * sx_n, mask=keep, other=0.0).to(tl.float32)
        b = tl.load(y_ptr[None, :] + wide * sy_n, mask=keep, other=0.0).to(tl.float32)
        a = ((a - x_pivot[None, :]) - x_mean[None, :]) * x_inverse[None, :]
        b = ((b - y_pivot[None, :]) - y_mean[None, :]) * y_inverse[None, :]
        acc += tl.where(keep, value(a, FORMAT) * value(b, FORMAT), 0.0)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["rows", "row_blocks", "block_rows"])
def statistics_kernel(
    x, y, moments, diagonal, partials, invariances, taken,
    rows, dim, row_blocks, block_rows,
    sx_n, sx_d, sy_n, sy_d,
    degrees, eps, std_eps,
    GRAM: tl.constexpr, FINAL: tl.constexpr, FORMAT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stage 1: means, scatters and comoment of COLUMNS columns over block_rows rows of both views.
    FINAL (one row block): stage 2 as well.

    Reads 2 N D elements once, 14 operations each, and writes 20 D row_blocks bytes: bound by
    bandwidth. Running means per row slot, so that threads meet once a block and not once a tile;
    shifted by row 0, so that a large common offset or a constant column costs no digits. Rounded
    operands (Gram side, FINAL): a second read, from L2, for C_jj of the rounded values.
    """
    degrees = tl.cast(degrees, tl.float32)
    eps = tl.cast(eps, tl.float32)
    std_eps = tl.cast(std_eps, tl.float32)
    blocks = tl.cdiv(dim, COLUMNS)
    block = tl.program_id(0) % blocks
    r = tl.program_id(0) // blocks
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < dim
    x_ptr = x + columns.to(tl.int64) * sx_d
    y_ptr = y + columns.to(tl.int64) * sy_d
    x_pivot = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    y_pivot = tl.load(y_ptr, mask=inside, other=0.0).to(tl.float32)

    count = tl.zeros((ROWS, 1), tl.float32)
    x_mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    x_scatter = tl.zeros((ROWS, COLUMNS), tl.float32)
    y_mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    y_scatter = tl.zeros((ROWS, COLUMNS), tl.float32)
    comoment = tl.zeros((ROWS, COLUMNS), tl.float32)
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
        b = tl.load(y_ptr[None, :] + offset * sy_n, mask=keep, other=0.0).to(tl.float32)
        before = (a - x_pivot[None, :]) - x_mean
        x_mean, x_scatter = welford(a, x_pivot[None, :], keep, filled, x_mean, x_scatter)
        y_mean, y_scatter = welford(b, y_pivot[None, :], keep, filled, y_mean, y_scatter)
        comoment += tl.where(keep, before * ((b - y_pivot[None, :]) - y_mean), 0.0)

    total = (last - first).to(tl.float32)
    a_mean, a_scatter = merge(count, x_mean, x_scatter, total)
    b_mean, b_scatter = merge(count, y_mean, y_scatter, total)
    shift = (x_mean - a_mean[None, :]) * (y_mean - b_mean[None, :])
    both = tl.sum(comoment + count * shift, axis=0)
    if FINAL:
        product = finish_columns(
            x_pivot, a_mean, a_scatter, y_pivot, b_mean, b_scatter, both, block, columns,
            rows, dim, degrees, eps, std_eps, moments, diagonal, invariances,
        )  # fmt: skip
        if GRAM:
            if FORMAT != "fp32":
                product = rounded_product(
                    x_ptr, y_ptr, inside,
                    x_pivot, a_mean, inverse_std(a_scatter, degrees, eps, std_eps),
                    y_pivot, b_mean, inverse_std(b_scatter, degrees, eps, std_eps),
                    rows, sx_n, sy_n, FORMAT, ROWS, COLUMNS,
                )  # fmt: skip
            store_taken(taken, block, product, inside)
    else:
        at = partials + r.to(tl.int64) * 5 * dim + columns
        tl.store(at, a_mean, mask=inside)
        tl.store(at + dim, a_scatter, mask=inside)
        tl.store(at + 2 * dim, b_mean, mask=inside)
        tl.store(at + 3 * dim, b_scatter, mask=inside)
        tl.store(at + 4 * dim, both, mask=inside)


@triton.jit(do_not_specialize=["rows", "row_blocks", "block_rows"])
def merge_kernel(
    x, y, moments, diagonal, partials, invariances, taken,
    rows, dim, row_blocks, block_rows, sx_d, sy_d,
    degrees, eps, std_eps,
    GRAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stage 2: the row blocks' partials as one, 40 D row_blocks bytes read."""
    degrees = tl.cast(degrees, tl.float32)
    eps = tl.cast(eps, tl.float32)
    std_eps = tl.cast(std_eps, tl.float32)
    block = tl.program_id(0)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < dim
    wide = columns.to(tl.int64)
    x_pivot = tl.load(x + wide * sx_d, mask=inside, other=0.0).to(tl.float32)
    y_pivot = tl.load(y + wide * sy_d, mask=inside, other=0.0).to(tl.float32)

    acc_x = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc_y = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, row_blocks, ROWS):
        r = first + tl.arange(0, ROWS)
        keep = (r < row_blocks)[:, None] & inside[None, :]
        count = tl.minimum(block_rows, rows - r * block_rows).to(tl.float32)[:, None]
        at = partials + r.to(tl.int64)[:, None] * 5 * dim + columns[None, :]
        acc_x += tl.where(keep, count * tl.load(at, mask=keep, other=0.0), 0.0)
        acc_y += tl.where(keep, count * tl.load(at + 2 * dim, mask=keep, other=0.0), 0.0)
    x_mean = tl.sum(acc_x, axis=0) / tl.cast(rows, tl.float32)
    y_mean = tl.sum(acc_y, axis=0) / tl.cast(rows, tl.float32)
    acc_x = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc_y = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, row_blocks, ROWS):
        r = first + tl.arange(0, ROWS)
        keep = (r < row_blocks)[:, None] & inside[None, :]
        count = tl.minimum(block_rows, rows - r * block_rows).to(tl.float32)[:, None]
        at = partials + r.to(tl.int64)[:, None] * 5 * dim + columns[None, :]
        dx = tl.load(at, mask=keep, other=0.0) - x_mean[None, :]
        dy = tl.load(at + 2 * dim, mask=keep, other=0.0) - y_mean[None, :]
        x_part = tl.load(at + dim, mask=keep, other=0.0)
        y_part = tl.load(at + 3 * dim, mask=keep, other=0.0)
        part = tl.load(at + 4 * dim, mask=keep, other=0.0)
        acc_x += tl.where(keep, x_part + count * dx * dx, 0.0)
        acc_y += tl.where(keep, y_part + count * dy * dy, 0.0)
        acc += tl.where(keep, part + count * dx * dy, 0.0)
    product = finish_columns(
        x_pivot, x_mean, tl.sum(acc_x, axis=0), y_pivot, y_mean, tl.sum(acc_y, axis=0),
        tl.sum(acc, axis=0), block, columns, rows, dim, degrees, eps, std_eps,
        moments, diagonal, invariances,
    )  # fmt: skip
    if GRAM:
        store_taken(taken, block, product, inside)
