"""The forward product of the VICReg op in Triton, its sum of squares, and the four terms.

A plane is one view of one group; planes are numbered view * groups + group. Views are centred as
their tiles are loaded, so no centred copy is stored. With m = min(N, D), sums of squares are taken
of covariances, that is after division by `degrees` = N - 1 (or N), as the formula does. Every
reduction runs in a fixed order. GPU times: not measured yet.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.core.triton.columns import load_mean, triangle
from vicreg_kernels.core.triton.operands import narrow, operand
from vicreg_kernels.core.triton.sums import total


@triton.jit
def next_largest(key, index):
    top = tl.max(key, axis=0)
    chosen = tl.min(tl.where(key == top, index, 2147483647), axis=0)
    return chosen, tl.where(index == chosen, -1.0, key)


@triton.jit
def largest_columns(
    candidates, candidate_index, blocks, DEFLATED: tl.constexpr, WIDTH: tl.constexpr
):
    """The DEFLATED (3 or 4) columns of largest scatter among the blocks' candidates, [4]; -1: none.

    Also the sum of the other columns' squared variances. WIDTH >= 4 blocks.
    """
    at = tl.arange(0, WIDTH)
    index = tl.load(candidate_index + at, mask=at < blocks * 4, other=-1)
    key = tl.load(candidates + (at // 4) * 5 + at % 4, mask=index >= 0, other=-1.0)
    first, key = next_largest(key, index)
    second, key = next_largest(key, index)
    third, key = next_largest(key, index)
    fourth = third * 0 - 1
    if DEFLATED > 3:
        fourth, key = next_largest(key, index)
    k = tl.arange(0, 4)
    chosen = tl.where(k == 0, first, tl.where(k == 1, second, tl.where(k == 2, third, fourth)))
    rest = tl.load(candidates + at * 5 + 4, mask=at < blocks, other=0.0).to(tl.float64)
    own = tl.where(key < 0.0, 0.0, key).to(tl.float64)
    return chosen, tl.sum(own * own + rest, axis=0)


@triton.jit(do_not_specialize=["groups", "rows", "blocks", "splits"])
def product_kernel(
    x, y, moments, out, sums, candidates, candidate_index, index, deflated_columns, diagonal,
    groups, rows, dim, side, blocks, splits, chunk,
    sx_g, sx_n, sx_d, sy_g, sy_n, sy_d,
    degrees,
    GRAM: tl.constexpr, WHOLE: tl.constexpr, FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    DEFLATED: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile (i <= j) of one plane over one chunk of the reduction, and its mirror image.

    GRAM: Zr Zr^T [N, N] over columns, where Zr leaves out the columns of largest scatter: they go
    to `deflated_columns` [planes, 4, N] and `index`, the sum of the others' squared variances to
    `diagonal`. Else Zc^T Zc [D, D] over rows with a zero diagonal. out: [planes, splits, m, m];
    side: m. WHOLE (D x D, one split): the sum of squared covariances too; else `strips_kernel`
    finds it.

    N D m operations a view, half of the full product's; a tile reads 2 TILE chunk elements and
    writes at most 8 TILE^2 bytes. Splits fill the GPU where tiles are few, and keep the tensor
    core's truncating accumulation short.
    """
    if GRAM:
        rows = side
    length = dim if GRAM else rows
    across = tl.cdiv(side, TILE)
    tiles = across * (across + 1) // 2
    t = tl.program_id(0) % tiles
    split = (tl.program_id(0) // tiles) % splits
    plane = tl.program_id(0) // (tiles * splits)
    i, j = triangle(t)
    p = plane.to(tl.int64)
    g = (plane % groups).to(tl.int64)
    z = tl.where(plane < groups, x + g * sx_g, y + g * sy_g)
    s_n = tl.where(plane < groups, sx_n, sy_n).to(tl.int64)
    s_d = tl.where(plane < groups, sx_d, sy_d).to(tl.int64)
    s_side = s_n if GRAM else s_d
    s_length = s_d if GRAM else s_n
    mean_ptr = moments + p * 3 * dim

    # Past the edge zeros are read, and not centred: what comes of them is never stored.
    a_side = i * TILE + tl.arange(0, TILE)
    b_side = j * TILE + tl.arange(0, TILE)
    a_live = (a_side < side)[:, None]
    b_live = (b_side < side)[:, None]
    a_ptr = z + a_side.to(tl.int64)[:, None] * s_side
    b_ptr = z + b_side.to(tl.int64)[:, None] * s_side
    if GRAM:
        chosen, others = largest_columns(
            candidates + p * blocks * 5, candidate_index + p * blocks * 4, blocks, DEFLATED, WIDTH
        )
        k = tl.arange(0, 4)
        t0 = tl.sum(tl.where(k == 0, chosen, 0))
        t1 = tl.sum(tl.where(k == 1, chosen, 0))
        t2 = tl.sum(tl.where(k == 2, chosen, 0))
        t3 = tl.sum(tl.where(k == 3, chosen, 0))
        if (i == j) & (split == 0):
            there = chosen >= 0
            column_ptr = z + chosen.to(tl.int64)[None, :] * s_d
            column_ptr += a_side.to(tl.int64)[:, None] * s_n
            column = tl.load(column_ptr, mask=a_live & there[None, :], other=0.0).to(tl.float32)
            origin, offset = load_mean(mean_ptr, dim, chosen, there)
            centred = (column - origin[None, :]) - offset[None, :]
            column = tl.where(there[None, :], centred, 0.0)
            at = (p * 4 + k)[None, :] * rows + a_side[:, None]
            tl.store(deflated_columns + at, column, mask=a_live)
            if i == 0:
                tl.store(index + p * DEFLATED + k, chosen.to(tl.int64), mask=k < DEFLATED)
                tl.store(diagonal + p, others)
    else:
        a_origin, a_offset = load_mean(mean_ptr, dim, a_side, a_side < side)
        b_origin, b_offset = load_mean(mean_ptr, dim, b_side, b_side < side)

    acc = tl.zeros((TILE, TILE), tl.float32)
    first = split * chunk
    for start in range(first, tl.minimum(first + chunk, length), DEPTH):
        r = start + tl.arange(0, DEPTH)
        inside = r < length
        along = r.to(tl.int64)[None, :] * s_length
        a = tl.load(a_ptr + along, mask=a_live & inside[None, :], other=0.0).to(tl.float32)
        b = tl.load(b_ptr + along, mask=b_live & inside[None, :], other=0.0).to(tl.float32)
        if GRAM:
            origin, offset = load_mean(mean_ptr, dim, r, inside)
            keep = (inside & (r != t0) & (r != t1) & (r != t2) & (r != t3))[None, :]
            a = tl.where(keep, (a - origin[None, :]) - offset[None, :], 0.0)
            b = tl.where(keep, (b - origin[None, :]) - offset[None, :], 0.0)
        else:
            a = tl.where(inside[None, :], (a - a_origin[:, None]) - a_offset[:, None], 0.0)
            b = tl.where(inside[None, :], (b - b_origin[:, None]) - b_offset[:, None], 0.0)
        a = operand(a, FORMAT)
        b = operand(b, FORMAT)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)

    if FORMAT == "fp16":
        acc *= 4.0
    if not GRAM:
        acc = tl.where(a_side[:, None] == b_side[None, :], 0.0, acc)
    valid = a_live & (b_side < side)[None, :]
    if WHOLE:
        c = tl.where(valid, acc / tl.cast(degrees, tl.float32), 0.0)
        twice = tl.where(i == j, 1.0, 2.0)
        tl.store(sums + p * tiles + t, (twice * tl.sum(c * c)).to(tl.float64))
    base = out + (p * splits + split) * side * side
    tl.store(base + a_side.to(tl.int64)[:, None] * side + b_side[None, :], acc, mask=valid)
    if i != j:
        mirror = base + b_side.to(tl.int64)[:, None] * side + a_side[None, :]
        tl.store(mirror, tl.trans(acc), mask=tl.trans(valid))


@triton.jit(do_not_specialize=["splits"])
def strips_kernel(
    parts, squares, sums, deflated_columns, deflated, diagonal,
    side, splits,
    degrees,
    GRAM: tl.constexpr, DEFLATED: tl.constexpr, ROUND: tl.constexpr,
    STRIP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """STRIP rows of one plane's square matrix: adds the splits, stores, sums squared covariances.

    GRAM: brings the deflated columns back without cancellation (docs/cancellation.md): with Kr the
    matrix of the others, `squares` = Kr + Z_T Z_T^T, `deflated` row k = Kr z_k + sum over the other
    deflated i of z_i (z_i . z_k), and the sum gains 2 z_k^T Kr z_k and the deflated columns' own
    products and loses `diagonal`. parts: [planes, splits, m, m], or `squares` itself with one
    split. squares: float32, or bfloat16 where the gradient's product takes it so. ROUND: the
    interpreter truncates to bfloat16.

    Reads 4 splits m^2 bytes a plane and writes 4 m^2, from and to L2 at the sizes that are split.
    """
    strips = tl.cdiv(side, STRIP)
    strip = tl.program_id(0) % strips
    p = (tl.program_id(0) // strips).to(tl.int64)
    inverse = 1.0 / tl.cast(degrees, tl.float32)
    row = strip * STRIP + tl.arange(0, STRIP)
    live = row < side
    k = tl.arange(0, 4)
    line = row.to(tl.int64)[:, None] * side
    plane_size = tl.cast(side, tl.int64) * side
    deflated_ptr = deflated_columns + p * 4 * side
    if GRAM:
        own = tl.load(
            deflated_ptr + k[None, :] * side + row[:, None], mask=live[:, None], other=0.0
        )
        applied = tl.zeros((STRIP, 4), tl.float32)  # Kr z_k
        cross = tl.zeros((4, 4), tl.float32)  # z_i . z_k

    total = tl.zeros((STRIP, WIDTH), tl.float32)
    for start in range(0, side, WIDTH):
        column = start + tl.arange(0, WIDTH)
        keep = live[:, None] & (column < side)[None, :]
        at = line + column[None, :]
        m = tl.zeros((STRIP, WIDTH), tl.float32)
        for first in range(0, splits, 4):
            s = first + tl.arange(0, 4)
            here = parts + ((p * splits + s) * plane_size)[:, None, None] + at[None, :, :]
            some = (s < splits)[:, None, None] & keep[None, :, :]
            m += tl.sum(tl.load(here, mask=some, other=0.0), axis=0)
        c = m * inverse
        total += c * c
        if GRAM:
            inside = (column < side)[None, :]
            z = tl.load(deflated_ptr + k[:, None] * side + column[None, :], mask=inside, other=0.0)
            applied += tl.sum(m[:, None, :] * z[None, :, :], axis=2)
            cross += tl.sum(z[:, None, :] * z[None, :, :], axis=2)
            m += tl.sum(own[:, :, None] * z[None, :, :], axis=1)
        m = narrow(m, squares, "bf16 in fp32" if ROUND else "fp32")
        tl.store(squares + p * plane_size + at, m, mask=keep)

    answer = tl.sum(total).to(tl.float64)
    if GRAM:
        cross = tl.where(k[:, None] == k[None, :], 0.0, cross)
        answer += tl.sum(2.0 * (applied * inverse) * (own * inverse)).to(tl.float64)
        if strip == 0:
            c = cross * inverse
            answer += tl.sum(c * c).to(tl.float64) - tl.load(diagonal + p)
        applied += tl.sum(own[:, :, None] * cross[None, :, :], axis=1)
        at = deflated + p * DEFLATED * side + k[None, :] * side + row[:, None]
        tl.store(at, applied, mask=live[:, None] & (k < DEFLATED)[None, :])
    tl.store(sums + p * strips + strip, answer)


@triton.jit(do_not_specialize=["difference_count", "hinge_count", "sum_count"])
def terms_kernel(
    terms, differences, hinges, sums,
    difference_count, hinge_count, sum_count,
    invariance_factor, variance_factor, covariance_factor, w0, w1, w2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """terms[4] from the partial sums of all planes; one program, a few thousand numbers."""
    invariance = total(differences, difference_count, BLOCK)
    invariance *= tl.cast(invariance_factor, tl.float32)
    variance = tl.cast(variance_factor, tl.float32) * total(hinges, hinge_count, BLOCK)
    covariance = tl.cast(covariance_factor, tl.float32) * total(sums, sum_count, BLOCK)
    loss = tl.cast(w0, tl.float32) * invariance + tl.cast(w1, tl.float32) * variance
    loss += tl.cast(w2, tl.float32) * covariance
    tl.store(terms, loss.to(tl.float32))
    tl.store(terms + 1, invariance.to(tl.float32))
    tl.store(terms + 2, variance.to(tl.float32))
    tl.store(terms + 3, covariance.to(tl.float32))
