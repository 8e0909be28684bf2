"""Rules as integers in Triton: which sample a program has, which tiles it visits, which it masks.

A query sees at most two intervals of keys (formula.h, key_intervals). A tile of queries then visits
the hull of its rows' intervals, and the keys that all its rows see are taken whole, without a mask.
For a tile of keys the same is found the other way round: the queries that see any of its keys, and
those that see all of them. What padding hides (lengths, keep) needs no mask there: a hidden key's
own gradient is dropped at the end.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

# Past every token: the begin of an interval that is not there.
FAR = tl.constexpr(1 << 30)
# Offsets looked at together.
SAMPLES = tl.constexpr(512)


@triton.jit
def find_sample(offsets, samples, batch, program, TILE: tl.constexpr):
    """(sample, tile in it) of a program of a batch row. samples: 0 where rows are the samples;
    else the grid is ragged, of total // TILE + samples programs.

    Sample s gets the programs from offsets[s] // TILE + s on. They are enough, since
    (o + n) // TILE + 1 >= o // TILE + cdiv(n, TILE); what is left over finds no row and ends. So
    no sum over the samples is needed, and the host need not know their lengths.
    """
    begun = program * 0
    for first in range(0, samples, SAMPLES):
        s = first + tl.arange(0, SAMPLES)
        begin = tl.load(offsets + s, mask=s < samples, other=0) // TILE + s
        begun += tl.sum(((s < samples) & (begin <= program)).to(tl.int32), axis=0)
    ragged = samples > 0
    sample = tl.where(ragged, begun - 1, batch)
    begin = tl.load(offsets + sample, mask=ragged, other=0)
    return sample, program - tl.where(ragged, begin // TILE + sample, 0)


@triton.jit
def extent(offsets, samples, sample, tokens):
    """(first token, tokens) of a sample; samples: as of find_sample."""
    begin = tl.load(offsets + sample, mask=samples > 0, other=0)
    return begin, tl.load(offsets + sample + 1, mask=samples > 0, other=tokens) - begin


@triton.jit
def padded(lengths, length_stride, sample, keys, VARIED: tl.constexpr):
    """The keys of a sample that `lengths` leaves; length_stride: 0 where there are no lengths."""
    if VARIED:
        at = lengths + sample * length_stride
        return tl.minimum(keys, tl.load(at, mask=length_stride > 0, other=keys))
    else:
        return keys


@triton.jit
def extents(
    q_offsets, k_offsets, samples, tokens, all_keys, batch, program,
    VARIED: tl.constexpr, OF_QUERIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The program's sample: (number, tile in it, first query, queries, first key, keys). VARIED:
    samples may have offsets or lengths of their own; else what is the same everywhere is known to
    be, and takes no registers.
    """
    if VARIED:
        own = q_offsets if OF_QUERIES else k_offsets
        sample, tile = find_sample(own, samples, batch, program, TILE)
        q_begin, queries = extent(q_offsets, samples, sample, tokens)
        k_begin, keys = extent(k_offsets, samples, sample, all_keys)
        return sample, tile, q_begin, queries, k_begin, keys
    else:
        return batch, program, batch * 0, batch * 0 + tokens, batch * 0, batch * 0 + all_keys


@triton.jit
def key_intervals(
    query, keys, bounds, blocks, frame, window,
    FRAMES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """What queries [R] see: begin and end of their first and of their second interval, each [R].

    window: frames that a query sees, its own included; as many as there are if all are seen.
    """
    begin = query * 0
    end = query * 0 + keys
    if FRAMES:
        own = query // frame
        end = tl.minimum((own + 1) * frame, end)
        begin = tl.maximum(own - window + 1, 0) * frame
    first_end = end
    second = query * 0
    second_end = query * 0
    if BLOCKS:
        for m in range(0, blocks):
            low = tl.load(bounds + m)
            high = tl.load(bounds + m + 1)
            inside = (low <= query) & (query < high)
            second = tl.where(inside, low, second)
            second_end = tl.where(inside, high, second_end)
        second = tl.maximum(second, begin)
        second_end = tl.minimum(second_end, end)
        first_end = tl.minimum(end, tl.load(bounds))
    return begin, first_end, second, second_end


@triton.jit
def hull(begin, end):
    """For intervals [R]: begin and end of what any has, begin and end of what all have."""
    some = begin < end
    low = tl.where(some, begin, FAR)
    high = tl.where(some, end, 0)
    return tl.min(low, axis=0), tl.max(high, axis=0), tl.max(low, axis=0), tl.min(high, axis=0)


@triton.jit
def tiles_of(begin, end, whole_begin, whole_end, TILE: tl.constexpr):
    """(masked tiles, the first whole one, whole tiles) of [begin, end), cut from `begin` on."""
    tiles = tl.cdiv(tl.maximum(end - begin, 0), TILE)
    first = tl.minimum(tl.cdiv(tl.maximum(whole_begin - begin, 0), TILE), tiles)
    last = tl.minimum(tl.maximum(whole_end - begin, 0) // TILE, tiles)
    whole = tl.maximum(last - first, 0)
    return tiles - whole, first, whole


@triton.jit
def key_tiles(
    begin, end, second, second_end, keys,
    RULED: tl.constexpr, BLOCKS: tl.constexpr, KEEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The key tiles of a tile of queries: for each interval (first key, end, masked tiles, first
    whole tile, whole tiles). RULED: by frames or blocks; KEEP: by a boolean too, so none is whole.
    """
    low = keys * 0
    high = keys
    whole = keys * 0
    whole_end = keys
    if RULED:
        low, high, whole, whole_end = hull(begin, end)
    if KEEP:
        whole_end = keys * 0
    masked, first, count = tiles_of(low, high, whole, whole_end, TILE)
    low2 = keys * 0
    high2 = keys * 0
    masked2 = keys * 0
    first2 = keys * 0
    count2 = keys * 0
    if BLOCKS:
        low2, high2, whole, whole_end = hull(second, second_end)
        if KEEP:
            whole_end = keys * 0
        masked2, first2, count2 = tiles_of(low2, high2, whole, whole_end, TILE)
    return low, high, masked, first, count, low2, high2, masked2, first2, count2


@triton.jit
def query_range(
    first, last, queries, bounds, blocks, frame, window,
    FRAMES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """For keys first to last (included, none hidden by padding): begin and end of the queries that
    see any of them, begin and end of those that see all of them.
    """
    low = first * 0
    high = first * 0 + queries
    if BLOCKS:
        context = tl.load(bounds)
        end = tl.load(bounds + blocks)
        begin_of_first = context  # of the block that has the first key
        end_of_first = context
        end_of_last = end  # of the block that has the last key; past all blocks nothing is seen
        for m in range(0, blocks):
            left = tl.load(bounds + m)
            right = tl.load(bounds + m + 1)
            has_first = (left <= first) & (first < right)
            begin_of_first = tl.where(has_first, left, begin_of_first)
            end_of_first = tl.where(has_first, right, end_of_first)
            end_of_last = tl.where((left <= last) & (last < right), right, end_of_last)
        in_context = first < context
        low = tl.where(in_context, 0, begin_of_first)
        high = tl.where(in_context, queries, tl.where(first < end, end_of_last, 0))
        all_context = last < context
        one_block = (context <= first) & (last < end_of_first)
        whole = tl.where(all_context, 0, begin_of_first)
        whole_end = tl.where(all_context, queries, tl.where(one_block, end_of_first, 0))
    else:
        whole = low
        whole_end = high
    if FRAMES:
        early = first // frame
        late = last // frame
        low = tl.maximum(low, early * frame)
        whole = tl.maximum(whole, late * frame)
        high = tl.minimum(high, (late + window) * frame)
        whole_end = tl.minimum(whole_end, (early + window) * frame)
    # blocks may be written for a longer sample than this one
    return low, tl.minimum(high, queries), whole, tl.minimum(whole_end, queries)


@triton.jit
def tile_start(t, low, first, whole, MASKED: tl.constexpr, TILE: tl.constexpr):
    """Where the t-th masked tile, or the t-th whole one, of an interval begins."""
    if MASKED:
        return low + tl.where(t < first, t, t + whole) * TILE
    else:
        return low + (first + t) * TILE
