"""Sequence assembly in Triton: the grid order by counting, the rows in it, a column sum over rows.

A token's place is the number of tokens before it in the stable order, counted over the S tokens of
its sequence: S comparisons a token, which for the S of a predictor (2048) take less time than
the rows of 384 columns that they place. GPU times: not measured yet.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.core.triton.operands import round_if
from vicreg_kernels.core.triton.strides import across, along, row_at
from vicreg_kernels.tokens.triton.rows import SIZES


@triton.jit
def position_of(k, kept, total, context_index, target_index):
    """The grid position of token k of a sequence: context tokens, then target tokens."""
    first = k < kept
    own = tl.load(context_index + k, mask=first, other=0).to(tl.int64)
    other = tl.load(target_index + k - kept, mask=(k < total) & (first == 0), other=0).to(tl.int64)
    return tl.where(first, own, other)


@triton.jit(do_not_specialize=["kept", "wanted", "contexts", "blocks"])
def order_kernel(
    context_index, target_index, context_offsets, target_offsets, order, context_rows, target_rows,
    kept, wanted, contexts, blocks,
    PACKED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    s = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if PACKED:
        c_begin = tl.load(context_offsets + s)
        t_begin = tl.load(target_offsets + s)
        c_count = tl.maximum(tl.load(context_offsets + s + 1) - c_begin, 0)
        t_count = tl.maximum(tl.load(target_offsets + s + 1) - t_begin, 0)
        base = c_begin + t_begin
        begin = base
        to_context = c_begin
    else:
        c_begin = (s % contexts) * kept
        t_begin = s * wanted
        c_count = tl.cast(kept, tl.int64)
        t_count = tl.cast(wanted, tl.int64)
        base = s * 0
        begin = s * (kept + wanted)
        to_context = s * kept
    total = c_count + t_count
    context = context_index + c_begin
    target = target_index + t_begin
    for first in range(block * BLOCK, total, blocks * BLOCK):
        k = first + tl.arange(0, BLOCK).to(tl.int64)
        position = position_of(k, c_count, total, context, target)
        place = tl.zeros((BLOCK,), tl.int32)
        own = position.to(tl.int32)[:, None]  # int64 tiles would spill
        rank = k.to(tl.int32)[:, None]
        for chunk in range(0, total, CHUNK):
            j = chunk + tl.arange(0, CHUNK).to(tl.int64)
            other = position_of(j, c_count, total, context, target).to(tl.int32)[None, :]
            before = (other < own) | ((other == own) & (j.to(tl.int32)[None, :] < rank))
            before = before & (j < total)[None, :]
            place += tl.sum(before.to(tl.int32), axis=1)
        there = k < total
        tl.store(order + begin + place, position.to(order.dtype.element_ty), mask=there)
        row = (base + place).to(order.dtype.element_ty)
        is_context = k < c_count
        tl.store(context_rows + to_context + k, row, mask=is_context)
        tl.store(target_rows + t_begin + k - c_count, row, mask=there & (is_context == 0))


@triton.jit(
    do_not_specialize=[
        "kept", "wanted", "contexts", "dim", "table_length",
        "sc_g", "sc_r", "sc_d", "st_g", "st_r", "st_d",
    ],
    do_not_specialize_on_alignment=["context", "target"],
)  # fmt: skip
def assemble_kernel(
    context, context_index, context_rows, target, target_index, target_rows, table, out,
    kept, wanted, contexts, dim, table_length, sc_g, sc_r, sc_d, st_g, st_r, st_d,
    TABLE: tl.constexpr, ROUND: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a token: its row, plus its position's, to its place. NaN where the position is not
    in the table; a place out of range is not written. dim and strides: in UNITs.
    """
    dim *= UNIT
    sc_d, st_d = along(sc_d, UNIT), along(st_d, UNIT)
    total = kept + wanted
    s = (tl.program_id(0) // total).to(tl.int64)
    k = tl.program_id(0) % total
    is_context = k < kept
    own = s % contexts
    c_row = s * kept + k
    t_row = s * wanted + k - kept
    place = tl.load(context_rows + c_row, mask=is_context, other=0).to(tl.int64)
    place += tl.load(target_rows + t_row, mask=is_context == 0, other=0).to(tl.int64)
    position = tl.load(context_index + own * kept + k, mask=is_context, other=0).to(tl.int64)
    position += tl.load(target_index + t_row, mask=is_context == 0, other=0).to(tl.int64)
    there = (place >= 0) & (place < total)
    known = (position >= 0) & (position < table_length)
    # limits of columns, where the interpreter would spoil a mask combined with one truth value
    c_limit = tl.where(is_context, dim, 0)
    t_limit = tl.where(is_context, 0, dim)
    table_limit = tl.where(known, dim, 0)
    limit = tl.where(there, dim, 0)
    offset = own * across(sc_g, UNIT) + tl.cast(k, tl.int64) * across(sc_r, UNIT)
    c_at = row_at(context, offset, UNIT)
    offset = s * across(st_g, UNIT) + tl.cast(k - kept, tl.int64) * across(st_r, UNIT)
    t_at = row_at(target, offset, UNIT)
    to = out + (s * total + place) * dim
    for first in range(0, dim, BLOCK):
        column = first + tl.arange(0, BLOCK)
        wide = column.to(tl.int64)
        value = tl.load(c_at + wide * sc_d, mask=column < c_limit, other=0.0).to(tl.float32)
        other = tl.load(t_at + wide * st_d, mask=column < t_limit, other=0.0).to(tl.float32)
        value = tl.where(column < c_limit, value, other)
        if TABLE:
            at = table + position * dim + column
            value += tl.load(at, mask=column < table_limit, other=float("nan"))
        tl.store(to + column, round_if(value, out, ROUND), mask=column < limit)


@triton.jit(do_not_specialize=[*SIZES, "count", "tiles", "block_rows"])
def column_kernel(
    sequence, rows, partials, length, dim, count, each, tiles, block_rows, stride_g, stride_r,
    stride_d, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partials[row block, D] = the sum of a block of rows of sequence that `rows` names."""
    dim *= UNIT
    stride_d = along(stride_d, UNIT)
    tile = tl.program_id(0) % tiles
    block = tl.program_id(0) // tiles
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    last = tl.minimum((block + 1) * block_rows, count)
    for first in range(block * block_rows, last, ROWS):
        r = (first + tl.arange(0, ROWS)).to(tl.int64)
        there = r < last
        row = tl.load(rows + r, mask=there, other=0).to(tl.int64)
        there = there & (row >= 0) & (row < length)
        at = sequence + (r // each) * across(stride_g, UNIT) + row * across(stride_r, UNIT)
        at = at[:, None] + column.to(tl.int64)[None, :] * stride_d
        keep = there[:, None] & inside[None, :]
        total += tl.load(at, mask=keep, other=0.0).to(tl.float32)
    at = partials + tl.cast(block, tl.int64) * dim + column
    tl.store(at, tl.sum(total, axis=0), mask=inside)


@triton.jit(do_not_specialize=["blocks", "dim"])
def column_finish_kernel(partials, out, blocks, dim, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    total = tl.zeros((COLUMNS,), tl.float64)
    for block in range(0, blocks):
        at = partials + tl.cast(block, tl.int64) * dim + column
        total += tl.load(at, mask=inside, other=0.0).to(tl.float64)
    tl.store(out + column, total.to(tl.float32), mask=inside)
