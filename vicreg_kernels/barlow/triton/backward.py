"""The gradient of the Barlow Twins op in Triton; csrc/barlow/formula.h has its derivation.

GPU times: not measured yet.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.barlow.triton.statistics import inverse_std, load_scale
from vicreg_kernels.core.triton.operands import narrow, square_operand, view_operand


@triton.jit
def coefficients(
    grad, lambd, diagonal, scatter, dot, rows, degrees, eps, std_eps,
    GRAM: tl.constexpr,
):  # fmt: skip
    """What multiplies a column's product, the other view's z and its own z in the gradient.

    dot: sum_n of product times z. diagonal: C_jj.
    """
    rows = tl.cast(rows, tl.float32)
    of_product = 2.0 * lambd / rows
    of_other = 2.0 / rows * (diagonal - 1.0)
    if GRAM:  # its product has the diagonal's lambd C_jj z in it
        of_product = of_product / rows
        of_other = 2.0 / rows * ((diagonal - 1.0) - lambd * diagonal)
    along = of_product * dot + of_other * rows * diagonal  # sum_n g z
    root = tl.sqrt(scatter / degrees + eps)
    slope = tl.where(root == 0.0, 0.0, (root + std_eps) / (root * degrees))  # as torch.std has it
    scale = grad * inverse_std(scatter, degrees, eps, std_eps)
    return scale * of_product, scale * of_other, -scale * slope * along


@triton.jit
def load_centred(z, s_n, s_d, row, column, keep, inside, moments, dim, degrees, eps, std_eps):
    """A tile [ROWS, COLUMNS] of z less its mean, and what it is to be multiplied with, [COLUMNS];
    outside `inside`, a mask of columns, undefined.
    """
    origin, offset, scale = load_scale(moments, dim, column, inside, degrees, eps, std_eps)
    at = z + row.to(tl.int64)[:, None] * s_n + column.to(tl.int64)[None, :] * s_d
    own = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    return (own - origin[None, :]) - offset[None, :], scale


@triton.jit
def load_standardised(
    z, s_n, s_d, row, column, keep, inside, moments, dim, degrees, eps, std_eps
):  # fmt: skip
    """A tile [ROWS, COLUMNS] of z; outside `inside` undefined."""
    centred, scale = load_centred(
        z, s_n, s_d, row, column, keep, inside, moments, dim, degrees, eps, std_eps
    )
    return centred * scale[None, :]


@triton.jit
def cross_squares_kernel(
    cross, sums, dim, STRIP: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """N >= D: sums [2, D] of the squares of C in each row and in each column; a program takes a
    strip of both. Reads 8 D^2 bytes, from L2 at most sizes.
    """
    strip = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    live = (strip < dim)[:, None]
    by_row = tl.zeros((STRIP, WIDTH), tl.float32)
    by_column = tl.zeros((WIDTH, STRIP), tl.float32)
    for start in range(0, dim, WIDTH):
        r = start + tl.arange(0, WIDTH)
        keep = live & (r < dim)[None, :]
        row_at = cross + strip.to(tl.int64)[:, None] * dim + r[None, :]
        column_at = cross + r.to(tl.int64)[:, None] * dim + strip[None, :]
        a = tl.load(row_at, mask=keep, other=0.0)
        b = tl.load(column_at, mask=tl.trans(keep), other=0.0)
        by_row += a * a
        by_column += b * b
    tl.store(sums + strip, tl.sum(by_row, axis=1), mask=strip < dim)
    tl.store(sums + dim + strip, tl.sum(by_column, axis=0), mask=strip < dim)


@triton.jit(do_not_specialize=["rows", "first_view"], do_not_specialize_on_alignment=["grad"])
def gradient_kernel(
    grad, x, y, moments, diagonal, products, sums, out_x, out_y,
    rows, dim, side, first_view,
    sx_n, sx_d, sy_n, sy_d,
    lambd, degrees, eps, std_eps,
    GRAM: tl.constexpr, FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of one view's product. GRAM: K of the other view times Z, float32 into out [N, D],
    and its column sums of product times z into sums [2, down, D], for `finish_kernel`. Else the
    other view's Z times C^T or C, and with the sums [2, D] of C's squares the gradient itself.

    The Gram matrix's diagonal, N^0.5 or more times the rest, multiplies z unrounded: most of that
    is in z's own direction, where the standardisation's gradient takes it out again.

    2 N D m operations a view, m = min(N, D); reads N D elements (else 3 N D) and writes N D, while
    the square matrix stays in L2.
    """
    lambd = tl.cast(lambd, tl.float32)
    degrees = tl.cast(degrees, tl.float32)
    eps = tl.cast(eps, tl.float32)
    std_eps = tl.cast(std_eps, tl.float32)
    if GRAM:
        rows = side
    down = tl.cdiv(rows, ROWS)
    across = tl.cdiv(dim, COLUMNS)
    tile = tl.program_id(0) % (down * across)
    view = first_view + tl.program_id(0) // (down * across)
    # Neighbours share the operand that is not the square matrix.
    i = tile % down if GRAM else tile // across
    j = tile // down if GRAM else tile % across
    is_x = view == 0
    own = tl.where(is_x, x, y)
    own_n = tl.where(is_x, sx_n, sy_n).to(tl.int64)
    own_d = tl.where(is_x, sx_d, sy_d).to(tl.int64)
    other = tl.where(is_x, y, x)
    other_n = tl.where(is_x, sy_n, sx_n).to(tl.int64)
    other_d = tl.where(is_x, sy_d, sx_d).to(tl.int64)
    own_moments = moments + view * 3 * dim
    other_moments = moments + (1 - view) * 3 * dim

    row = i * ROWS + tl.arange(0, ROWS)
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    tall = row.to(tl.int64)
    some_rows = (row < rows)[:, None]
    live = column < dim
    keep = some_rows & live[None, :]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if GRAM:
        origin, offset, scale = load_scale(own_moments, dim, column, live, degrees, eps, std_eps)
        square = products + (1 - view) * tl.cast(rows, tl.int64) * rows
        for start in range(0, rows, DEPTH):
            r = start + tl.arange(0, DEPTH)
            inside = r < rows
            square_at = square + tall[:, None] * rows + r[None, :]
            a = tl.load(square_at, mask=some_rows & inside[None, :], other=0.0)
            a = tl.where(row[:, None] == r[None, :], 0.0, a)
            z_at = own + r.to(tl.int64)[:, None] * own_n + column.to(tl.int64)[None, :] * own_d
            b = tl.load(z_at, mask=inside[:, None] & live[None, :], other=0.0).to(tl.float32)
            b = ((b - origin[None, :]) - offset[None, :]) * scale[None, :]
            b = tl.where(inside[:, None], b, 0.0)
            a = square_operand(a, FORMAT)
            b = view_operand(b, FORMAT)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        # C[column, r] for x, C[r, column] for y.
        c_column = tl.where(is_x, dim, 1).to(tl.int64)
        c_r = tl.where(is_x, 1, dim).to(tl.int64)
        for start in range(0, dim, DEPTH):
            r = start + tl.arange(0, DEPTH)
            inside = r < dim
            a = load_standardised(
                other, other_n, other_d, row, r, some_rows & inside[None, :], inside,
                other_moments, dim, degrees, eps, std_eps,
            )  # fmt: skip
            a = tl.where(inside[None, :], a, 0.0)
            square_at = products + r[:, None] * c_r + column[None, :] * c_column
            b = tl.load(square_at, mask=inside[:, None] & live[None, :], other=0.0)
            a = view_operand(a, FORMAT)
            b = square_operand(b, FORMAT)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if GRAM:
        own_z = load_standardised(
            own, own_n, own_d, row, column, keep, live, own_moments, dim, degrees, eps, std_eps
        )
        acc += tl.load(square + tall * (rows + 1), mask=row < rows, other=0.0)[:, None] * own_z
        dot = tl.sum(tl.where(keep, acc * own_z, 0.0), axis=0)
        tl.store(sums + (view * down + i).to(tl.int64) * dim + column, dot, mask=live)
        target = tl.where(is_x, out_x, out_y) + tall[:, None] * dim + column[None, :]
        tl.store(target, acc, mask=keep)
    else:
        c = tl.load(diagonal + column, mask=live, other=0.0)
        scatter = tl.load(own_moments + 2 * dim + column, mask=live, other=1.0)
        dot = rows * tl.load(sums + view * dim + column, mask=live, other=0.0)
        of_product, of_other, of_own = coefficients(
            tl.load(grad), lambd, c, scatter, dot, rows, degrees, eps, std_eps, GRAM
        )
        # One view after the other, the target's addresses last: in other orders Triton 3.6 spills.
        g = of_product[None, :] * acc
        g += of_other[None, :] * load_standardised(
            other, other_n, other_d, row, column, keep, live,
            other_moments, dim, degrees, eps, std_eps,
        )  # fmt: skip
        centred, scale = load_centred(
            own, own_n, own_d, row, column, keep, live, own_moments, dim, degrees, eps, std_eps
        )
        g += (of_own * scale)[None, :] * centred
        target = tl.where(is_x, out_x, out_y) + tall[:, None] * dim + column[None, :]
        tl.store(target, narrow(g, out_x, FORMAT), mask=keep)


@triton.jit
def view_coefficients(
    grad, lambd, diagonal, sums, moments, column, live, rows, dim, parts, degrees, eps, std_eps,
    DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`coefficients` of one view on the Gram side; sums: its [parts, dim]."""
    acc = tl.zeros((DEPTH, COLUMNS), tl.float32)
    for first in range(0, parts, DEPTH):
        r = first + tl.arange(0, DEPTH)
        some = (r < parts)[:, None] & live[None, :]
        at = sums + r.to(tl.int64)[:, None] * dim + column[None, :]
        acc += tl.load(at, mask=some, other=0.0)
    c = tl.load(diagonal + column, mask=live, other=0.0)
    scatter = tl.load(moments + 2 * dim + column, mask=live, other=1.0)
    dot = tl.sum(acc, axis=0)
    return coefficients(grad, lambd, c, scatter, dot, rows, degrees, eps, std_eps, True)


@triton.jit(
    do_not_specialize=["rows", "parts", "block_rows"], do_not_specialize_on_alignment=["grad"]
)
def finish_kernel(
    grad, x, y, moments, diagonal, sums, product_x, product_y, grad_x, grad_y,
    rows, dim, parts, block_rows,
    sx_n, sx_d, sy_n, sy_d,
    lambd, degrees, eps, std_eps,
    NEED_X: tl.constexpr, NEED_Y: tl.constexpr, FORMAT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """N < D: the gradients from the products, for block_rows rows of COLUMNS columns. The products
    may be the gradients' own memory. Reads 4 bytes and one element, twice, and writes 2 elements,
    for each of the N D.
    """
    lambd = tl.cast(lambd, tl.float32)
    degrees = tl.cast(degrees, tl.float32)
    eps = tl.cast(eps, tl.float32)
    std_eps = tl.cast(std_eps, tl.float32)
    across = tl.cdiv(dim, COLUMNS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    live = column < dim
    g = tl.load(grad)
    if NEED_X:
        xp, xo, xs = view_coefficients(
            g, lambd, diagonal, sums, moments, column, live, rows, dim, parts,
            degrees, eps, std_eps, ROWS, COLUMNS,
        )  # fmt: skip
    if NEED_Y:
        yp, yo, ys = view_coefficients(
            g, lambd, diagonal, sums + tl.cast(parts, tl.int64) * dim, moments + 3 * dim,
            column, live, rows, dim, parts, degrees, eps, std_eps, ROWS, COLUMNS,
        )  # fmt: skip
    first = (tl.program_id(0) // across) * block_rows
    last = tl.minimum(first + block_rows, rows)
    for n in range(first, last, ROWS):
        row = n + tl.arange(0, ROWS)
        keep = (row < last)[:, None] & live[None, :]
        zx = load_standardised(
            x, sx_n, sx_d, row, column, keep, live, moments, dim, degrees, eps, std_eps
        )
        zy = load_standardised(
            y, sy_n, sy_d, row, column, keep, live, moments + 3 * dim, dim, degrees, eps, std_eps
        )
        at = row.to(tl.int64)[:, None] * dim + column[None, :]
        if NEED_X:
            product = tl.load(product_x + at, mask=keep, other=0.0)
            product = xp[None, :] * product + xo[None, :] * zy + xs[None, :] * zx
            tl.store(grad_x + at, narrow(product, grad_x, FORMAT), mask=keep)
        if NEED_Y:
            product = tl.load(product_y + at, mask=keep, other=0.0)
            product = yp[None, :] * product + yo[None, :] * zx + ys[None, :] * zy
            tl.store(grad_y + at, narrow(product, grad_y, FORMAT), mask=keep)
