"""The SIGReg op's Triton kernels but for the sums: directions, statistic, gradient. Of all of them:

With E = G N M projections, K knots and e the bytes of an element of z. A float32 operation is one
instruction of one lane, multiply-add included; products are counted in multiply-adds.

                        reads and writes (bytes)           operations
    directions_kernel   e D M                              about 120 D M, twice: nothing is kept
    sums_kernel         e (G N D + D M) + 8 E + partials   E D multiply-adds; (35 + 4 K) E
    statistic_kernel    8 G K M (row blocks + 1)           20 G K M
    finish_kernel       8 G K M (row blocks + 1)           small; across ranks alone
    waves_kernel        4 E + e' E                         (35 + 4 K) E
    product_kernel      e' E + e (D M + G N D)             E D multiply-adds

where partials are 8 K / ROWS bytes for each projection and e' is 4, or 2 for bfloat16. At
2048 x 512 x 1024 x 17 (16 knots without 0) in bfloat16 that is 1.1 G multiply-adds in each product,
2 us on an H100's tensor cores, 2.1 M projections with about 99 operations each way, 7 us of its
29 T lane operations a second, and 24 MB forward and 20 MB backward, 13 us together from memory and
less from its L2. So the waves bound both halves, and their count is what the kernels save on.
Times: not measured yet.

A projection costs one sincos for up to 16 equally spaced knots: sums.py says how forward.
Backward, the waves are a polynomial in e^{i spacing p}: complex Horner, four multiply-adds a knot.

The gradient's product does not compute the waves in its prologue. For every tile of D they would be
computed anew: at D = 512 four times, 28 us for 7. Where one tile holds all of D the count is the
same, but then there are N / 64 programs, which fill 132 multiprocessors from N = 8448 on; what is
saved there is the way of the waves through memory, at most a quarter of the time, for a second
product kernel. So there is one way: waves to a scratch, then the product.

One launch adds up the row blocks' sums, makes the coefficients and, in the program that comes last,
the loss: three launches of 2 to 4 us each (an estimate) that each waited for the one before.

Compilations. Knots, weights and sizes are arguments, so that a kernel is compiled once for a dtype,
a tile and a kind of knots. No size is specialised on (SIZES): where 16-byte accesses are aligned,
sizes and strides are counted in UNIT elements, 16 bytes' worth, which says the same, else UNIT is 1
and all strides are general.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,assignment"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.core.triton.operands import narrow, round_to
from vicreg_kernels.sigreg.triton.maths import MOST_KNOTS, SIZES, circle, normals, operand, twice


@triton.jit(do_not_specialize=[*SIZES, "number", "key"])
def directions_kernel(
    step, out, number: tl.int64, key: tl.int64, dim, slices,
    FORMAT: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of out [D, M], each divided by its norm. step: None, or added to `number`.

    The normals are drawn twice, once for the norms: that is cheaper than a way through memory.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, GROUPS)
    now = tl.cast(number, tl.int64)
    if step is not None:
        now += tl.load(step)
    groups = tl.cdiv(dim, 4)
    first = column.to(tl.int64)[None, :] * groups
    square = tl.zeros((GROUPS, COLUMNS), tl.float32)
    for start in range(0, groups, GROUPS):
        group = (start + lane)[:, None]
        draw = normals(tl.cast(key, tl.int64), now, first + group)
        for i in tl.static_range(4):
            live = (4 * group + i < dim) & (column >= 0)[None, :]
            square += tl.where(live, draw[i] * draw[i], 0.0)
    norm = tl.sqrt_rn(tl.sum(square, axis=0))[None, :]
    for start in range(0, groups, GROUPS):
        group = (start + lane)[:, None]
        draw = normals(tl.cast(key, tl.int64), now, first + group)
        for i in tl.static_range(4):
            row = 4 * group + i
            live = (row < dim) & (column < slices)[None, :]
            at = row.to(tl.int64) * slices + column[None, :]
            tl.store(out + at, narrow(tl.div_rn(draw[i], norm), out, FORMAT), mask=live)


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(partials, out, row_blocks, size, BLOCK: tl.constexpr):
    """out[i] = sum of partials[r, i] over the row blocks, in order; there are `size` of each."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for r in range(0, row_blocks):
        at = partials + tl.cast(r, tl.int64) * size + i
        total += tl.load(at, mask=i < size, other=0.0)
    tl.store(out + i, total, mask=i < size)


@triton.jit(do_not_specialize=SIZES)
def statistic_kernel(
    partials, done, shares, loss, coefficients,
    groups, row_blocks, slices, knots, count, scale, lead, rule,
    MOST: tl.constexpr, UNIT: tl.constexpr, HIGH: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A knot of COLUMNS slices of one group: its sums over the row blocks, its two coefficients,
    and its share of the loss before `scale`, one float64 a program. The program that is last to
    count itself in `done`, 0 before, adds the shares up, in their order.

    rule: MOST knots, then as many weights and values of exp(-t^2 / 2); slices: in UNITs.
    """
    count = tl.cast(count, tl.float32)
    lead = tl.cast(lead, tl.float32)
    slices *= UNIT
    across = tl.cdiv(slices, COLUMNS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.program_id(0) // across % knots
    g = (tl.program_id(0) // (across * knots)).to(tl.int64)
    knot, weight, target = rule[0], rule[MOST], rule[2 * MOST]
    for other in tl.static_range(1, MOST):
        knot = tl.where(k == other, rule[other], knot)
        weight = tl.where(k == other, rule[MOST + other], weight)
        target = tl.where(k == other, rule[2 * MOST + other], target)
    inside = column < slices
    behind = tl.cast(knots, tl.int64) * slices
    cosines = (g * 2 * knots + k) * slices + column
    c = tl.zeros((HIGH, COLUMNS), tl.float32)
    s = tl.zeros((HIGH, COLUMNS), tl.float32)
    for first in range(0, row_blocks, HIGH):
        block = first + tl.arange(0, HIGH)
        live = (block < row_blocks)[:, None] & inside[None, :]
        at = partials + block.to(tl.int64)[:, None] * (2 * groups * behind) + cosines[None, :]
        c += tl.load(at, mask=live, other=0.0)
        s += tl.load(at + behind, mask=live, other=0.0)
    # the difference is rounded once
    real = tl.div_rn(tl.fma(count, -target, tl.sum(c, axis=0)), count)
    imaginary = tl.div_rn(tl.sum(s, axis=0), count)
    slope = lead * (weight * knot)
    tl.store(coefficients + cosines, slope * imaginary, mask=inside)
    tl.store(coefficients + cosines + behind, -slope * real, mask=inside)
    square = weight * tl.fma(real, real, imaginary * imaginary)
    tl.store(
        shares + tl.program_id(0), tl.sum(tl.where(inside, square, 0.0).to(tl.float64), axis=0)
    )
    before = tl.atomic_add(done, 1, sem="acq_rel", scope="gpu")
    if before == tl.num_programs(0) - 1:
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, tl.num_programs(0), BLOCK):
            i = start + tl.arange(0, BLOCK)
            live = i < tl.num_programs(0)
            total += tl.load(shares + i, mask=live, other=0.0, cache_modifier=".cg")
        tl.store(loss, (tl.sum(total, axis=0) * tl.cast(scale, tl.float32)).to(tl.float32))


@triton.jit(do_not_specialize=SIZES)
def waves_kernel(
    grad, coefficients, projections, out,
    rows, slices, row_blocks, knots, turns,
    EQUAL: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr, FORMAT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of out [G, N, M] = grad (sum_k a cos(t_k p) + b sin(t_k p)), a and b by column."""
    slices *= UNIT
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
    own = coefficients + g * 2 * knots * slices + column
    behind = tl.cast(knots, tl.int64) * slices
    if EQUAL:  # Re sum_k (a_k - i b_k) e^{i t_k p}, by Horner in e^{i spacing p}
        c, s = circle(p, turns[0], turns[1])
        first_c, first_s = c, s
        if HALF:
            c, s = twice(c, s)
        real = tl.zeros((ROWS, COLUMNS), tl.float32)
        imaginary = tl.zeros((ROWS, COLUMNS), tl.float32)
        # A loop: unrolled whole, all coefficients are loaded first, into every register.
        for below in tl.range(0, knots, loop_unroll_factor=4):
            here = own + (knots - 1 - below) * tl.cast(slices, tl.int64)
            a = tl.load(here, mask=inside, other=0.0)[None, :]
            b = tl.load(here + behind, mask=inside, other=0.0)[None, :]
            next_real = tl.fma(real, c, tl.fma(-imaginary, s, a))
            imaginary = tl.fma(real, s, tl.fma(imaginary, c, -b))
            real = next_real
        wave = tl.fma(real, first_c, -imaginary * first_s)
    else:
        wave = tl.zeros((ROWS, COLUMNS), tl.float32)
        for group in range(0, knots, 4):  # a loop for the same reason, so knots are selected
            for each in tl.static_range(4):
                high, low = turns[2 * each], turns[2 * each + 1]
                for k in tl.static_range(4 + each, MOST_KNOTS, 4):
                    high = tl.where(group + each == k, turns[2 * k], high)
                    low = tl.where(group + each == k, turns[2 * k + 1], low)
                some = column < tl.where(group + each < knots, slices, 0)
                at_knot = own + (group + each) * tl.cast(slices, tl.int64)
                a_k = tl.load(at_knot, mask=some, other=0.0)[None, :]
                b_k = tl.load(at_knot + behind, mask=some, other=0.0)[None, :]
                cosine, sine = circle(p, high, low)
                wave = tl.fma(a_k, cosine, tl.fma(b_k, sine, wave))
    wave *= tl.load(grad)
    if FORMAT == "tf32" or FORMAT == "fp16":
        wave = round_to(wave, 8193.0)
    tl.store(out + at, narrow(wave, out, FORMAT), mask=live)


@triton.jit(do_not_specialize=SIZES)
def product_kernel(
    waves, directions, out,
    rows, dim, slices, row_blocks, a_d, a_m,
    UNIT: tl.constexpr, FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of waves A^T [G, N, D]: the gradient."""
    dim *= UNIT
    slices *= UNIT
    a_d = tl.cast(a_d, tl.int64) * UNIT
    if UNIT > 1:
        a_m = 1
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
