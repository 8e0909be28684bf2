"""Gather and scatter of token rows in Triton.

A program moves one row: e D bytes read and written. Scatter first finds which rows name each token,
with integer maxima, whose result does not depend on their order; each row of the result then has
one owner, which fills it, copies one row into it, or adds up several in ascending order. A row that
is not there is masked by a limit of 0 columns: the interpreter spoils a mask combined with a single
truth value. GPU times: not measured yet.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.core.triton.operands import round_if
from vicreg_kernels.core.triton.strides import across, along, row_at

# What no kernel is specialised on, beside what its own decorator names.
SIZES = [
    "length", "dim", "batch", "each", "steps", "slots", "stride_g", "stride_r", "stride_d",
]  # fmt: skip


@triton.jit
def sample_of(row, offsets, batch, each, steps):
    """The sample of a row, in [0, batch) whatever the offsets hold. steps: log2 of the batch, at
    least 1, of packed rows; 0: a sample has `each` rows.
    """
    low = row * 0
    high = low + batch
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(offsets + middle) <= row
        more = high - low > 1
        low = tl.where(more & below, middle, low)
        high = tl.where(more & (below == 0), middle, high)
    return tl.where(steps > 0, low, (row // each) % batch)


@triton.jit
def row_offset(row, each, stride_group, stride_row):
    """Where row r of [P, K, D] begins."""
    return (row // each) * stride_group + (row % each) * stride_row


@triton.jit(
    do_not_specialize=[*SIZES, "stride_b", "stride_t"], do_not_specialize_on_alignment=["x"]
)
def gather_kernel(
    x, index, offsets, out, length, dim, batch, each, steps, stride_b, stride_t, stride_d,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[r] = the token of its sample that index[r] names; NaN where there is none. dim and
    strides: in UNITs, here and below.
    """
    dim *= UNIT
    stride_d = along(stride_d, UNIT)
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(index + row).to(tl.int64)
    valid = (token >= 0) & (token < length)
    limit = tl.where(valid, dim, 0)
    sample = sample_of(row, offsets, batch, each, steps)
    offset = sample * across(stride_b, UNIT) + tl.where(valid, token, 0) * across(stride_t, UNIT)
    source = row_at(x, offset, UNIT)
    for first in range(0, dim, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < dim
        value = tl.load(
            source + column.to(tl.int64) * stride_d, mask=column < limit, other=float("nan")
        )
        tl.store(out + row * dim + column, value, mask=inside)


@triton.jit(do_not_specialize=["rows", *SIZES])
def map_kernel(index, offsets, maps, rows, length, batch, each, steps, slots, BLOCK: tl.constexpr):
    """maps [2, B T], -1 before: the last row that names each token, and rows - 1 - the first."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    token = tl.load(index + row, mask=there, other=-1).to(tl.int64)
    there = there & (token >= 0) & (token < length)
    slot = sample_of(row, offsets, batch, each, steps) * length + token
    slot = tl.where(there, slot, 0)
    tl.atomic_max(maps + slot, row.to(tl.int32), mask=there)
    tl.atomic_max(maps + slots + slot, (rows - 1 - row).to(tl.int32), mask=there)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["rows"])
def scatter_kernel(
    rows, maps, out, dim, each, fill, stride_g, stride_r, stride_d,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[slot] = the last row that names it, or fill."""
    dim *= UNIT
    stride_d = along(stride_d, UNIT)
    fill = tl.cast(fill, tl.float32)
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(maps + slot).to(tl.int64)
    named = row >= 0
    row = tl.where(named, row, 0)
    limit = tl.where(named, dim, 0)
    offset = row_offset(row, each, across(stride_g, UNIT), across(stride_r, UNIT))
    source = row_at(rows, offset, UNIT)
    for first in range(0, dim, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < dim
        filling = tl.full((BLOCK,), 0.0, tl.float32) + fill
        value = tl.load(
            source + column.to(tl.int64) * stride_d,
            mask=column < limit,
            other=filling.to(out.dtype.element_ty),
        )
        tl.store(out + slot * dim + column, value, mask=inside)


@triton.jit(do_not_specialize=[*SIZES, "count", "samples"], do_not_specialize_on_alignment=["rows"])
def sum_kernel(
    rows, index, maps, out, count, length, dim, each, slots, samples, stride_g, stride_r, stride_d,
    ROUND: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[slot] = the sum of the rows that name it, over `samples` samples. Rows between the first
    and the last are asked only where a token repeats.
    """
    dim *= UNIT
    stride_g, stride_r = across(stride_g, UNIT), across(stride_r, UNIT)
    stride_d = along(stride_d, UNIT)
    slot = tl.program_id(0).to(tl.int64)
    token = slot % length
    for begin in range(0, dim, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < dim
        total = tl.zeros((BLOCK,), tl.float32)
        for s in range(0, samples):
            at = maps + slot + s * length
            last = tl.load(at)
            first = count - 1 - tl.load(at + slots)
            for r in range(first, last + 1):
                row = tl.cast(r, tl.int64)
                limit = tl.where(tl.load(index + row).to(tl.int64) == token, dim, 0)
                source = row_at(rows, row_offset(row, each, stride_g, stride_r), UNIT)
                offset = column.to(tl.int64) * stride_d
                total += tl.load(source + offset, mask=column < limit, other=0.0).to(tl.float32)
        tl.store(out + slot * dim + column, round_if(total, out, ROUND), mask=inside)
