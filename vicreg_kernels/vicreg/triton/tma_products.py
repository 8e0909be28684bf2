"""The products of the VICReg op in Triton for large min(N, D) in half precision: operands reach the
tensor core through shared memory by TMA, in tiles of 128 x 128 and more.

Centring and rounding in the product itself, as forward.py does, sends every operand through
registers once a tile: m / 64 times. Here one pass writes the centred views (2 + 2 bytes a value),
and the square matrix is stored as the gradient's product multiplies it. At m = 2048 that pass
is 45 us of H100 memory time by counting (2 x 2048 x 8192 bfloat16, 134 MB at 3 TB/s), the products
0.26 ms at 790 TFLOP/s. GPU times: not measured yet.

Descriptors are made on the host and passed by value as parameters of the launch: no allocator is
set, and a CUDA graph keeps its own copies. Warp specialisation (`tl.range(warp_specialize=True)`)
was compiled and left out: for sm_90, Triton 3.6 and 3.9 fail on the reduction in the epilogue with
4 warps and ignore the request with 8; for sm_100 they make it, at 255 registers.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.core.triton.columns import load_mean, triangle
from vicreg_kernels.core.triton.operands import operand
from vicreg_kernels.vicreg.triton.backward import store_gradient
from vicreg_kernels.vicreg.triton.forward import largest_columns


@triton.jit(do_not_specialize=["groups", "rows", "blocks", "row_blocks"])
def centre_kernel(
    x, y, moments, centred, candidates, candidate_index, index, deflated_columns, diagonal,
    groups, rows, dim, blocks, row_blocks,
    sx_g, sx_n, sx_d, sy_g, sy_n, sy_d,
    GRAM: tl.constexpr, FORMAT: tl.constexpr, DEFLATED: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The operands of one plane's products, centred [planes, N, D], ROWS STEPS rows of COLUMNS.

    GRAM: with zeros in the columns of largest scatter, which go to `deflated_columns`
    [planes, 4, N] and `index`; the sum of the others' squared variances goes to `diagonal`. Reads
    N D elements a view and writes as many.
    """
    across = tl.cdiv(dim, COLUMNS)
    j = tl.program_id(0) % across
    i = (tl.program_id(0) // across) % row_blocks
    plane = tl.program_id(0) // (across * row_blocks)
    p = plane.to(tl.int64)
    g = (plane % groups).to(tl.int64)
    z = tl.where(plane < groups, x + g * sx_g, y + g * sy_g)
    s_n = tl.where(plane < groups, sx_n, sy_n).to(tl.int64)
    s_d = tl.where(plane < groups, sx_d, sy_d).to(tl.int64)
    mean_ptr = moments + p * 3 * dim
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    origin, offset = load_mean(mean_ptr, dim, column, inside)
    if GRAM:
        chosen, others = largest_columns(
            candidates + p * blocks * 5, candidate_index + p * blocks * 4, blocks, DEFLATED, WIDTH
        )
        k = tl.arange(0, 4)
        left_out = tl.max((chosen[:, None] == column[None, :]).to(tl.int32), axis=0)
        there = chosen >= 0
        t_origin, t_offset = load_mean(mean_ptr, dim, chosen, there)
        if (i == 0) & (j == 0):
            tl.store(index + p * DEFLATED + k, chosen.to(tl.int64), mask=k < DEFLATED)
            tl.store(diagonal + p, others)
    for step in range(STEPS):
        row = (i * STEPS + step) * ROWS + tl.arange(0, ROWS)
        live = (row < rows)[:, None]
        tall = row.to(tl.int64)[:, None]
        keep = live & inside[None, :]
        at = z + tall * s_n + column.to(tl.int64)[None, :] * s_d
        own = tl.load(at, mask=keep, other=0.0).to(tl.float32)
        own = (own - origin[None, :]) - offset[None, :]
        if GRAM:
            own = tl.where((left_out == 0)[None, :], own, 0.0)
            if j == 0:
                deflated_at = z + tall * s_n + chosen.to(tl.int64)[None, :] * s_d
                value = tl.load(deflated_at, mask=live & there[None, :], other=0.0).to(tl.float32)
                value = (value - t_origin[None, :]) - t_offset[None, :]
                value = tl.where(there[None, :], value, 0.0)
                to = deflated_columns + (p * 4 + k)[None, :] * rows + row[:, None]
                tl.store(to, value, mask=live)
        target = centred + (p * rows + tall) * dim + column[None, :]
        tl.store(target, operand(own, FORMAT).to(centred.dtype.element_ty), mask=keep)


@triton.jit
def factor(tile, FORMAT: tl.constexpr):
    """A loaded tile as tl.dot multiplies it; see core/triton/operands.py for "bf16 in fp32"."""
    return tile.to(tl.float32) if FORMAT == "bf16 in fp32" else tile


@triton.jit
def banded_triangle(t, across, BAND: tl.constexpr):
    """Tile t of the upper triangle: (i, j), i <= j < across, in bands of BAND columns.

    Programs that run together cover about as many rows as columns, so that they read half as much
    as column by column: 132 tiles of 128 x 128 share 33 operand panels of 128 instead of 65.
    """
    _, j = triangle(t)
    band = (j // BAND) * BAND
    width = tl.minimum(BAND, across - band)
    t -= band * (band + 1) // 2
    above = band * width
    u = tl.maximum(t - above, 0)
    i, j = triangle(u)
    i = tl.where(t < above, t // width, band + i)
    return i, band + tl.where(t < above, t % width, j)


@triton.jit(do_not_specialize=["length", "side"])
def symmetric_kernel(
    a_operand, b_operand, out, mirror, sums,
    side, length, degrees,
    GRAM: tl.constexpr, FORMAT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One tile of one plane's symmetric product, its mirror image, and its share of the sum.

    GRAM: Zr Zr^T [N, N] over columns, else Zc^T Zc [D, D] over rows with a zero diagonal and the
    sum of squared covariances. COLUMNS is a multiple of ROWS; a square of COLUMNS x COLUMNS on the
    diagonal is computed whole. Operands, out and mirror are descriptors of [planes, ...].

    N D m (1 + COLUMNS / m) operations a view; a tile reads (ROWS + COLUMNS) length elements.
    """
    PARTS: tl.constexpr = COLUMNS // ROWS
    across = tl.cdiv(side, COLUMNS)
    tiles = PARTS * across * (across + 1) // 2
    t = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    i, j = banded_triangle(t // PARTS, across, BAND)
    top = (i * PARTS + t % PARTS) * ROWS
    left = j * COLUMNS
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, length, DEPTH):
        if GRAM:
            a = factor(a_operand.load([plane, top, start]), FORMAT).reshape(ROWS, DEPTH)
            b = factor(b_operand.load([plane, left, start]), FORMAT).reshape(COLUMNS, DEPTH)
            acc = tl.dot(a, b.T, acc)
        else:
            a = factor(a_operand.load([plane, start, top]), FORMAT).reshape(DEPTH, ROWS)
            b = factor(b_operand.load([plane, start, left]), FORMAT).reshape(DEPTH, COLUMNS)
            acc = tl.dot(a.T, b, acc)
    if FORMAT == "fp16":
        acc *= 4.0
    if not GRAM:
        row = top + tl.arange(0, ROWS)
        column = left + tl.arange(0, COLUMNS)
        acc = tl.where(row[:, None] == column[None, :], 0.0, acc)
        c = acc / tl.cast(degrees, tl.float32)  # beyond the edge zeros, which TMA fills in
        twice = tl.where(i == j, 1.0, 2.0)
        tl.store(sums + tl.program_id(0), (twice * tl.sum(c * c)).to(tl.float64))
    tile = narrow_square(acc, out.dtype, FORMAT)
    out.store([plane, top, left], tile.reshape(1, ROWS, COLUMNS))
    if i != j:
        mirror.store([plane, left, top], tile.T.reshape(1, COLUMNS, ROWS))


@triton.jit
def narrow_square(m, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    if (FORMAT == "bf16 in fp32") & (tl.bfloat16 == DTYPE):
        m = operand(m, FORMAT)
    return m.to(DTYPE)


@triton.jit
def halves(tile):
    """The left and the right half of a tile [R, C], which a thread has in its registers."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tile.reshape(rows, 2, columns // 2).permute(0, 2, 1).split()


@triton.jit(do_not_specialize=["groups", "rows", "first_plane", "each"])
def tiled_gradient_kernel(
    a_operand, b_operand, grads, x, y, moments, deflated, index, grad_x, grad_y,
    groups, rows, dim, first_plane, each,
    sx_g, sx_n, sx_d, sy_g, sy_n, sy_d,
    invariance_factor, variance_factor, covariance_factor, w0, w1, w2,
    degrees, margin, eps,
    VIEWS: tl.constexpr, GRAM: tl.constexpr, DEFLATED: tl.constexpr, FORMAT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of one plane: the product K Zc (GRAM) or Zc S, then the epilogue of
    `store_gradient`, an eighth of the columns at a time: its values do not fit beside a whole tile.

    2 N D m operations a view; reads 3 N D elements and writes N D. Tiles go by bands of BAND rows.
    Operands are descriptors of [planes, N, m] and [planes, m, D].
    """
    down = tl.cdiv(rows, ROWS)
    across = tl.cdiv(dim, COLUMNS)
    tile = tl.program_id(0) % (down * across)
    plane = first_plane + tl.program_id(0) // (down * across)
    band = (tile // (BAND * across)) * BAND
    height = tl.minimum(BAND, down - band)
    tile %= BAND * across
    i = band + tile % height
    j = tile // height
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows if GRAM else dim, DEPTH):
        a = factor(a_operand.load([plane, i * ROWS, start]), FORMAT).reshape(ROWS, DEPTH)
        b = factor(b_operand.load([plane, start, j * COLUMNS]), FORMAT).reshape(DEPTH, COLUMNS)
        acc = tl.dot(a, b, acc)

    PIECE: tl.constexpr = COLUMNS // 8
    row = i * ROWS + tl.arange(0, ROWS)
    left, right = halves(acc)
    for h in tl.static_range(2):
        first, second = halves(left if h == 0 else right)
        for q in tl.static_range(2):
            u, v = halves(first if q == 0 else second)
            for e in tl.static_range(2):
                store_gradient(
                    u if e == 0 else v,
                    row, j * COLUMNS + (4 * h + 2 * q + e) * PIECE + tl.arange(0, PIECE), plane,
                    grads, x, y, moments, deflated, index, grad_x, grad_y,
                    groups, rows, dim, each, sx_g, sx_n, sx_d, sy_g, sy_n, sy_d,
                    invariance_factor, variance_factor, covariance_factor, w0, w1, w2,
                    degrees, margin, eps, VIEWS, GRAM, DEFLATED, FORMAT,
                )  # fmt: skip
