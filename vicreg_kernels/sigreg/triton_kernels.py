"""The SIGReg op's Triton kernels: directions, sums, statistic, gradient.

With E = G N M projections, K knots and e the bytes of an element of z. A float32 operation is one
instruction of one lane, multiply-add included; products are counted in multiply-adds.

                        reads and writes (bytes)           operations
    directions_kernel   4 D M                              about 120 D M, twice: nothing is kept
    sums_kernel         e (G N D + D M) + 8 E + partials   E D multiply-adds; (35 + 4 K) E
    finish_kernel       8 G K M (row blocks + 1)           small
    statistic_kernel    16 G K M                           20 G K M
    waves_kernel        4 E + e' E                         (35 + 4 K) E
    product_kernel      e' E + e (D M + G N D)             E D multiply-adds

where partials are 8 K / ROWS bytes for each projection and e' is 4, or 2 for bfloat16. At
2048 x 512 x 1024 x 17 (16 knots without 0) in bfloat16 that is 1.1 G multiply-adds in each product,
2 us on an H100's tensor cores, 2.1 M projections with about 99 operations each way, 7 us of its
29 T lane operations a second, and 24 MB forward and 20 MB backward, 13 us together from memory and
less from its L2. So the waves bound both halves, and their count is what the kernels save on.
Times: not measured yet.

A projection costs one sincos for up to 16 equally spaced knots. Forward, knots are taken in pairs
mu +- d_j about the middle of their range:

    sum cos(mu +- d_j) = sum cos mu cos d_j -+ sum sin mu sin d_j
    sum sin(mu +- d_j) = sum sin mu cos d_j +- sum cos mu sin d_j

four multiply-adds a pair to add up and four to rotate d_j on, instead of four and eight. Backward,
the waves are a polynomial in e^{i spacing p}: complex Horner, four multiply-adds a knot.

The column sums are not taken in the product's own registers. A matrix instruction spreads a column
over 8 lanes and all warps, and 2 K reductions of a 128 x 64 tile would shuffle 3 times for every 4
values, about 190 issue slots a knot and thread where the sum itself takes 64 to 128. A tile of
projections has to be written anyway, for the backward; its program reads it back by columns, a lane
a column, from its own L1 or L2, with all sums in registers, and meets other lanes once.

The gradient's product does not compute the waves in its prologue. For every tile of D they would be
computed anew: at D = 512 four times, 28 us for 7. Where one tile holds all of D the count is the
same, but then there are N / 64 programs, which fill 132 multiprocessors from N = 8448 on; what is
saved there is the way of the waves through memory, at most a quarter of the time, for a second
product kernel. So there is one way: waves to a scratch, then the product.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,assignment"
# ruff: noqa: RUF005  (Triton's compiler adds tuples up, and does not unpack them)
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.sigreg.triton_maths import circle, normals, rotate, twice
from vicreg_kernels.vicreg.triton_operands import narrow, round_to


@triton.jit
def operand(a, FORMAT: tl.constexpr):
    """A tile of z, of the directions or of the waves as the matrix instruction takes it."""
    if FORMAT == "tf32":  # the tensor core alone would truncate
        return round_to(a, 8193.0)
    elif FORMAT == "bf16 in fp32":  # see vicreg/triton_operands.py
        return a.to(tl.float32)
    else:
        return a


@triton.jit
def directions_kernel(
    step, out, key, dim, slices, groups,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of out [D, M], each divided by its norm; groups = ceil(D / 4).

    The normals are drawn twice, once for the norms: that is cheaper than a way through memory.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, GROUPS)
    now = tl.load(step)
    seed = tl.cast(key, tl.int64)
    first = column.to(tl.int64)[None, :] * groups
    square = tl.zeros((GROUPS, COLUMNS), tl.float32)
    for start in range(0, groups, GROUPS):
        group = (start + lane)[:, None]
        draw = normals(seed, now, first + group)
        for i in tl.static_range(4):
            live = (4 * group + i < dim) & (column >= 0)[None, :]
            square += tl.where(live, draw[i] * draw[i], 0.0)
    norm = tl.sqrt_rn(tl.sum(square, axis=0))[None, :]
    for start in range(0, groups, GROUPS):
        group = (start + lane)[:, None]
        draw = normals(seed, now, first + group)
        for i in tl.static_range(4):
            row = 4 * group + i
            live = (row < dim) & (column < slices)[None, :]
            at = row.to(tl.int64) * slices + column[None, :]
            tl.store(out + at, tl.div_rn(draw[i], norm), mask=live)


@triton.jit
def paired_sums(
    projections, row, last, column, slices,
    ROWS: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr,
    START: tl.constexpr, CENTRES: tl.constexpr,
):  # fmt: skip
    """sum cos mu cos d, sin mu sin d, sin mu cos d, cos mu sin d over rows row to row + ROWS - 1
    for each of PAIRS d, then sum cos mu, sin mu: 4 PAIRS + 2 tensors [WIDE, COLUMNS].
    """
    sums = (tl.zeros((WIDE, COLUMNS), tl.float32),) * (4 * PAIRS + 2)
    for start in range(0, ROWS, WIDE):
        n = row + start + tl.arange(0, WIDE)
        live = (n < last)[:, None] & (column < slices)[None, :]
        at = projections + n.to(tl.int64)[:, None] * slices + column[None, :]
        p = tl.load(at, mask=live, other=0.0)
        first_c, first_s = circle(p, START[0], START[1])
        step_c, step_s = first_c, first_s
        if HALF:
            step_c, step_s = twice(first_c, first_s)
        c, s = first_c, first_s
        cosines, sines = (c,), (s,)
        for _ in tl.static_range(1, PAIRS):
            c, s = rotate(c, s, step_c, step_s)
            cosines, sines = cosines + (c,), sines + (s,)
        if CHUNK > 0:
            c, s = circle(p, CENTRES[CHUNK][0], CENTRES[CHUNK][1])
        elif HALF:
            c, s = rotate(c, s, first_c, first_s)
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
    projections, row, last, column, slices,
    ROWS: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, KNOTS: tl.constexpr,
):  # fmt: skip
    """sum cos, sum sin over the rows for knots FIRST to LAST - 1, a sincos each."""
    sums = (tl.zeros((WIDE, COLUMNS), tl.float32),) * (2 * (LAST - FIRST))
    for start in range(0, ROWS, WIDE):
        n = row + start + tl.arange(0, WIDE)
        live = (n < last)[:, None] & (column < slices)[None, :]
        at = projections + n.to(tl.int64)[:, None] * slices + column[None, :]
        p = tl.load(at, mask=live, other=0.0)
        one = live.to(tl.float32)
        new = ()
        for k in tl.static_range(FIRST, LAST):
            c, s = circle(p, KNOTS[k][0], KNOTS[k][1])
            new = new + (
                tl.fma(c, one, sums[2 * (k - FIRST)]),
                sums[2 * (k - FIRST) + 1] + s,
            )
        sums = new
    return sums


@triton.jit
def store_sums(out, k, cosine, sine, column, slices, COUNT: tl.constexpr):
    """out: [2, COUNT, slices] of one group and row block; cosine, sine: of knot k."""
    tl.store(out + tl.cast(k, tl.int64) * slices + column, cosine, mask=column < slices)
    at = out + tl.cast(COUNT + k, tl.int64) * slices + column
    tl.store(at, sine, mask=column < slices)


@triton.jit
def sums_kernel(
    z, directions, projections, out,
    groups, rows, dim, slices, row_blocks,
    s_g, s_n, s_d, a_d, a_m,
    COUNT: tl.constexpr, KNOTS: tl.constexpr, PAIRS: tl.constexpr, CHUNKS: tl.constexpr,
    HALF: tl.constexpr, START: tl.constexpr, CENTRES: tl.constexpr,
    FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of the projections of one group, and its column sums into out
    [row blocks, G, 2, K, M]. PAIRS = 0: knots of any spacing, in KNOTS; else START is the first,
    the spacing or with HALF half of it, and CENTRES has the centre of each chunk of 2 PAIRS knots.
    """
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
    out += (i.to(tl.int64) * groups + g) * 2 * COUNT * slices
    if PAIRS == 0:
        for first in tl.static_range(0, COUNT, 16):
            sums = single_sums(
                own, i * ROWS, rows, column, slices, ROWS, WIDE, COLUMNS,
                first, first + 16 if first + 16 < COUNT else COUNT, KNOTS,
            )  # fmt: skip
            for k in tl.static_range(first, first + 16 if first + 16 < COUNT else COUNT):
                cosine = tl.sum(sums[2 * (k - first)], axis=0)
                sine = tl.sum(sums[2 * (k - first) + 1], axis=0)
                store_sums(out, k, cosine, sine, column, slices, COUNT)
    else:
        for chunk in tl.static_range(CHUNKS):
            sums = paired_sums(
                own, i * ROWS, rows, column, slices, ROWS, WIDE, COLUMNS,
                PAIRS, chunk, HALF, START, CENTRES,
            )  # fmt: skip
            for k in tl.static_range(PAIRS):
                both = tl.join(sums[4 * k], sums[4 * k + 1])
                both = tl.join(both, tl.join(sums[4 * k + 2], sums[4 * k + 3]))
                cosines, sines = tl.split(tl.sum(both, axis=0))  # four sums meet at a barrier once
                cc, ss = tl.split(cosines)
                sc, cs = tl.split(sines)
                middle = (2 * chunk + 1) * PAIRS
                if middle + k < COUNT:
                    store_sums(out, middle + k, cc - ss, sc + cs, column, slices, COUNT)
                if HALF:
                    if middle - 1 - k < COUNT:
                        store_sums(out, middle - 1 - k, cc + ss, sc - cs, column, slices, COUNT)
                elif k < PAIRS - 1:
                    if middle - 2 - k < COUNT:
                        store_sums(out, middle - 2 - k, cc + ss, sc - cs, column, slices, COUNT)
                elif middle - 1 < COUNT:  # mu - d is the last knot of the chunk before, or 0
                    cosine = tl.sum(sums[4 * PAIRS], axis=0)
                    sine = tl.sum(sums[4 * PAIRS + 1], axis=0)
                    store_sums(out, middle - 1, cosine, sine, column, slices, COUNT)


@triton.jit
def finish_kernel(partials, out, row_blocks, count, BLOCK: tl.constexpr):
    """out[i] = sum of partials[r, i] over the row blocks, in order; count numbers each."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for r in range(0, row_blocks):
        at = partials + tl.cast(r, tl.int64) * count + i
        total += tl.load(at, mask=i < count, other=0.0)
    tl.store(out + i, total, mask=i < count)


@triton.jit
def statistic_kernel(
    sums, loss, partials, coefficients,
    slices, count, scale, lead,
    COUNT: tl.constexpr, KNOTS: tl.constexpr, WEIGHTS: tl.constexpr, TARGETS: tl.constexpr,
    ALONE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS slices of one group: the coefficients of its waves, and their share of the loss
    before `scale`, one float64 a program; ALONE: the one program writes the loss itself.
    """
    count = tl.cast(count, tl.float32)
    lead = tl.cast(lead, tl.float32)
    across = tl.cdiv(slices, COLUMNS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    g = (tl.program_id(0) // across).to(tl.int64)
    inside = column < slices
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(COUNT):
        cosines = (g * 2 * COUNT + k) * slices + column
        sines = (g * 2 * COUNT + COUNT + k) * slices + column
        c = tl.load(sums + cosines, mask=inside, other=0.0)
        s = tl.load(sums + sines, mask=inside, other=0.0)
        real = tl.div_rn(tl.fma(count, -TARGETS[k], c), count)  # the difference is rounded once
        imaginary = tl.div_rn(s, count)
        square = WEIGHTS[k] * tl.fma(real, real, imaginary * imaginary)
        total += tl.where(inside, square, 0.0)
        slope = lead * (WEIGHTS[k] * KNOTS[k])
        tl.store(coefficients + cosines, slope * imaginary, mask=inside)
        tl.store(coefficients + sines, -slope * real, mask=inside)
    share = tl.sum(total.to(tl.float64), axis=0)
    if ALONE:
        tl.store(loss, (share * tl.cast(scale, tl.float32)).to(tl.float32))
    else:
        tl.store(partials + tl.program_id(0), share)


@triton.jit
def loss_kernel(partials, loss, count, scale, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials + at, mask=at < count, other=0.0)
    tl.store(loss, (tl.sum(total, axis=0) * tl.cast(scale, tl.float32)).to(tl.float32))


@triton.jit
def waves_kernel(
    grad, coefficients, projections, out,
    rows, slices, row_blocks,
    COUNT: tl.constexpr, KNOTS: tl.constexpr, UNIFORM: tl.constexpr, HALF: tl.constexpr,
    START: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of out [G, N, M] = grad (sum_k a cos(t_k p) + b sin(t_k p)), a and b by column."""
    across = tl.cdiv(slices, COLUMNS)
    j = tl.program_id(0) % across
    i = (tl.program_id(0) // across) % row_blocks
    g = (tl.program_id(0) // (across * row_blocks)).to(tl.int64)
    row = i * ROWS + tl.arange(0, ROWS)
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < slices
    live = (row < rows)[:, None] & inside[None, :]
    at = (g * rows + row.to(tl.int64)[:, None]) * slices + column[None, :]
    p = tl.load(projections + at, mask=live, other=0.0)
    own = coefficients + g * 2 * COUNT * slices + column
    behind = tl.cast(COUNT, tl.int64) * slices
    if UNIFORM:  # Re sum_k (a_k - i b_k) e^{i t_k p}, by Horner in e^{i spacing p}
        c, s = circle(p, START[0], START[1])
        first_c, first_s = c, s
        if HALF:
            c, s = twice(c, s)
        real = tl.zeros((ROWS, COLUMNS), tl.float32)
        imaginary = tl.zeros((ROWS, COLUMNS), tl.float32)
        # A loop: unrolled whole, all coefficients are loaded first, into every register.
        for below in tl.range(0, COUNT, loop_unroll_factor=4):
            here = own + (COUNT - 1 - below) * tl.cast(slices, tl.int64)
            a = tl.load(here, mask=inside, other=0.0)[None, :]
            b = tl.load(here + behind, mask=inside, other=0.0)[None, :]
            next_real = tl.fma(real, c, tl.fma(-imaginary, s, a))
            imaginary = tl.fma(real, s, tl.fma(imaginary, c, -b))
            real = next_real
        wave = tl.fma(real, first_c, -imaginary * first_s)
    else:
        wave = tl.zeros((ROWS, COLUMNS), tl.float32)
        for group in range(0, COUNT, 4):  # a loop for the same reason, so knots are selected
            for each in tl.static_range(4):
                high = 0.0
                low = 0.0
                for k in tl.static_range(each, COUNT, 4):
                    high = tl.where(group + each == k, KNOTS[k][0], high)
                    low = tl.where(group + each == k, KNOTS[k][1], low)
                some = inside & (group + each < COUNT)
                at_knot = own + (group + each) * tl.cast(slices, tl.int64)
                a_k = tl.load(at_knot, mask=some, other=0.0)[None, :]
                b_k = tl.load(at_knot + behind, mask=some, other=0.0)[None, :]
                cosine, sine = circle(p, high, low)
                wave = tl.fma(a_k, cosine, tl.fma(b_k, sine, wave))
    wave *= tl.load(grad)
    if FORMAT == "tf32" or FORMAT == "fp16":
        wave = round_to(wave, 8193.0)
    tl.store(out + at, narrow(wave, out, FORMAT), mask=live)


@triton.jit
def product_kernel(
    waves, directions, out,
    rows, dim, slices, row_blocks, a_d, a_m,
    FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of waves A^T [G, N, D]: the gradient."""
    across = tl.cdiv(dim, COLUMNS)
    j = tl.program_id(0) % across
    i = (tl.program_id(0) // across) % row_blocks
    g = (tl.program_id(0) // (across * row_blocks)).to(tl.int64)
    row = i * ROWS + tl.arange(0, ROWS)
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    some_rows = (row < rows)[:, None]
    w_ptr = waves + (g * rows + row.to(tl.int64)[:, None]) * slices
    a_ptr = directions + column.to(tl.int64)[:, None] * a_d
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, slices, DEPTH):
        m = start + tl.arange(0, DEPTH)
        wide = m.to(tl.int64)[None, :]
        inside = (m < slices)[None, :]
        left = tl.load(w_ptr + wide, mask=some_rows & inside, other=0.0)
        right = tl.load(a_ptr + wide * a_m, mask=(column < dim)[:, None] & inside, other=0.0)
        if FORMAT == "bf16 in fp32":
            left = left.to(tl.float32)
        if FORMAT == "fp16":  # exact in tf32, whose range the waves need
            right = right.to(tl.float32)
        right = operand(right, FORMAT)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    at = (g * rows + row.to(tl.int64)[:, None]) * dim + column[None, :]
    tl.store(out + at, narrow(acc, out, FORMAT), mask=some_rows & (column < dim)[None, :])
