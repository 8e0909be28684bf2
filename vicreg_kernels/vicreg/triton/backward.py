"""The gradient of the VICReg op in Triton: one product, and what its epilogue adds.

GPU times: not measured yet.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.core.triton.columns import load_mean
from vicreg_kernels.core.triton.operands import narrow, square_operand, value, view_operand


@triton.jit
def store_gradient(
    acc, row, column, plane, grads, x, y, moments, deflated, index, grad_x, grad_y,
    groups, rows, dim, each,
    sx_g, sx_n, sx_d, sy_g, sy_n, sy_d,
    invariance_factor, variance_factor, covariance_factor, w0, w1, w2,
    degrees, margin, eps,
    VIEWS: tl.constexpr, GRAM: tl.constexpr, DEFLATED: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Turns a tile of the product, acc at `row` and `column`, into one of the gradient:

        a_inv (x - y) - a_var [std < margin] zc / (degrees std) + a_cov (product - d zc)

    where d is the column's scatter on the Gram side, so that i = j drops out, and 0 on the other;
    deflated columns have theirs in `deflated`. each: grads holds those of the four terms, else of
    loss. There d multiplies the operand's value, as the product did: what rounding is left is that
    of d, no larger than that of the square operand.
    """
    degrees = tl.cast(degrees, tl.float32)
    margin = tl.cast(margin, tl.float32)
    eps = tl.cast(eps, tl.float32)
    p = plane.to(tl.int64)
    g = (plane % groups).to(tl.int64)
    is_x = plane < groups
    z = tl.where(is_x, x + g * sx_g, y + g * sy_g)
    s_n = tl.where(is_x, sx_n, sy_n).to(tl.int64)
    s_d = tl.where(is_x, sx_d, sy_d).to(tl.int64)
    mean_ptr = moments + p * 3 * dim
    tall = row.to(tl.int64)
    wide = column.to(tl.int64)

    g0 = tl.load(grads)
    some = each != 0
    a_inv = g0 * tl.cast(w0, tl.float32) + tl.where(some, tl.load(grads + each), 0.0)
    a_var = g0 * tl.cast(w1, tl.float32) + tl.where(some, tl.load(grads + 2 * each), 0.0)
    a_cov = g0 * tl.cast(w2, tl.float32) + tl.where(some, tl.load(grads + 3 * each), 0.0)
    a_var *= tl.cast(variance_factor, tl.float32)
    a_cov *= tl.cast(covariance_factor, tl.float32)

    origin, offset = load_mean(mean_ptr, dim, column, column < dim)
    scatter = tl.load(mean_ptr + 2 * dim + column, mask=column < dim, other=1.0)
    std = tl.sqrt(scatter / degrees + eps)
    slope = tl.where(std >= margin, 0.0, a_var / (degrees * std))  # a NaN passes
    keep = (row < rows)[:, None] & (column < dim)[None, :]
    own_at = z + tall[:, None] * s_n + wide[None, :] * s_d
    own = tl.load(own_at, mask=keep, other=0.0).to(tl.float32)
    centred = (own - origin[None, :]) - offset[None, :]
    if GRAM:
        acc -= scatter[None, :] * value(centred, FORMAT)
        for k in tl.static_range(DEFLATED):
            at = p * DEFLATED + k
            exact = tl.load(deflated + at * rows + tall, mask=row < rows, other=0.0)
            acc = tl.where((column == tl.load(index + at))[None, :], exact[:, None], acc)
    grad = a_cov * acc - slope[None, :] * centred
    if VIEWS == 2:
        other = tl.where(is_x, y + g * sy_g, x + g * sx_g)
        o_n = tl.where(is_x, sy_n, sx_n).to(tl.int64)
        o_d = tl.where(is_x, sy_d, sx_d).to(tl.int64)
        other_at = other + tall[:, None] * o_n + wide[None, :] * o_d
        opposite = tl.load(other_at, mask=keep, other=0.0).to(tl.float32)
        grad += a_inv * tl.cast(invariance_factor, tl.float32) * (own - opposite)
    target = tl.where(is_x, grad_x, grad_y) + (g * rows + tall[:, None]) * dim + wide[None, :]
    tl.store(target, narrow(grad, grad_x, FORMAT), mask=keep)


@triton.jit(
    do_not_specialize=["rows", "first_plane", "each"],
    do_not_specialize_on_alignment=["grads", "groups"],
)
def gradient_kernel(
    grads, x, y, moments, squares, deflated, index, grad_x, grad_y,
    groups, rows, dim, side, first_plane, each,
    sx_g, sx_n, sx_d, sy_g, sy_n, sy_d,
    invariance_factor, variance_factor, covariance_factor, w0, w1, w2,
    degrees, margin, eps,
    VIEWS: tl.constexpr, GRAM: tl.constexpr, DEFLATED: tl.constexpr,
    FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of one plane: the product K Zc (GRAM) or Zc S, then the epilogue.

    2 N D m operations a view; reads 3 N D elements and writes N D, while the square matrix stays
    in L2.
    """
    if GRAM:
        rows = side
    down = tl.cdiv(rows, ROWS)
    across = tl.cdiv(dim, COLUMNS)
    tile = tl.program_id(0) % (down * across)
    plane = first_plane + tl.program_id(0) // (down * across)
    # Neighbours share the operand that is not the square matrix.
    i = tile % down if GRAM else tile // across
    j = tile // down if GRAM else tile % across
    p = plane.to(tl.int64)
    g = (plane % groups).to(tl.int64)
    is_x = plane < groups
    z = tl.where(is_x, x + g * sx_g, y + g * sy_g)
    s_n = tl.where(is_x, sx_n, sy_n).to(tl.int64)
    s_d = tl.where(is_x, sx_d, sy_d).to(tl.int64)
    square_ptr = squares + p * side * side
    mean_ptr = moments + p * 3 * dim

    row = i * ROWS + tl.arange(0, ROWS)
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    tall = row.to(tl.int64)
    wide = column.to(tl.int64)
    some_rows = (row < rows)[:, None]
    some_columns = (column < dim)[None, :]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if GRAM:
        origin, offset = load_mean(mean_ptr, dim, column, column < dim)
        for start in range(0, rows, DEPTH):
            r = start + tl.arange(0, DEPTH)
            inside = r < rows
            square_at = square_ptr + tall[:, None] * rows + r[None, :]
            a = tl.load(square_at, mask=some_rows & inside[None, :], other=0.0)
            z_at = z + r.to(tl.int64)[:, None] * s_n + wide[None, :] * s_d
            b = tl.load(z_at, mask=inside[:, None] & some_columns, other=0.0).to(tl.float32)
            b = tl.where(inside[:, None], (b - origin[None, :]) - offset[None, :], 0.0)
            a = square_operand(a, FORMAT)
            b = view_operand(b, FORMAT)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        for start in range(0, dim, DEPTH):
            r = start + tl.arange(0, DEPTH)
            inside = r < dim
            z_at = z + tall[:, None] * s_n + r.to(tl.int64)[None, :] * s_d
            a = tl.load(z_at, mask=some_rows & inside[None, :], other=0.0).to(tl.float32)
            o, f = load_mean(mean_ptr, dim, r, inside)
            a = tl.where(inside[None, :], (a - o[None, :]) - f[None, :], 0.0)
            square_at = square_ptr + r.to(tl.int64)[:, None] * dim + column[None, :]
            b = tl.load(square_at, mask=inside[:, None] & some_columns, other=0.0)
            a = view_operand(a, FORMAT)
            b = square_operand(b, FORMAT)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

    store_gradient(
        acc, row, column, plane, grads, x, y, moments, deflated, index, grad_x, grad_y,
        groups, rows, dim, each, sx_g, sx_n, sx_d, sy_g, sy_n, sy_d,
        invariance_factor, variance_factor, covariance_factor, w0, w1, w2, degrees, margin, eps,
        VIEWS, GRAM, DEFLATED, FORMAT,
    )  # fmt: skip
