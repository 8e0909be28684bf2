"""Nearest positions both ways in Triton, and the ranks of their distances.

match_kernel: a program takes A positions of a map and every position of the other in turns of B,
and sums squared differences in A x B x C registers, C channels side by side, which are added up
once a turn. The fp32 units do both the subtraction and the multiply-add, 2 S L1 L2 D operations for
S samples of all pairs of views; tl.dot in fp32 ("ieee") would use the same units, halve the
operations, and lose what |a|^2 + |b|^2 - 2 a.b cancels: eps |a|^2, more than the distance of
positions that nearly coincide. Reads e S D (L1 + L2 tiles) bytes, most of them from the caches.

Distance and index become one int64, whose minimum is the nearest position, ties to the lowest
index. rank_kernel merges the tiles' minima, 8 S (L1 + L2 tiles) bytes, and counts lower keys:
S (L1^2 + L2^2) comparisons. GPU times: not measured yet.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

# Above every key: those of distances are non-negative floats' bits, index below.
NO_KEY: tl.constexpr = tl.constexpr(0x7FFFFFFFFFFFFFFF)
# What no kernel is specialised on: sizes, strides (in UNITs, vicreg_kernels/core/units.py), counts.
SIZES = [
    "samples", "batch", "views_a", "views_b", "rows_a", "rows_b", "dim", "tiles", "blocks",
    "blocks_a", "blocks_b", "count_a",
    *(f"s{side}_{axis}" for side in "ab" for axis in "vnlc"),
    *(f"{side}_{count}" for side in "ab" for count in ("most", "c0", "c1", "c2", "c3")),
]  # fmt: skip


@triton.jit
def keys_of(distance, index):
    """Distances are never negative, so that their bits are ordered as they are; NaN is +inf."""
    distance = tl.where(distance == distance, distance, float("inf"))
    return (distance.to(tl.int32, bitcast=True).to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def strides_of(s_v, s_n, s_l, s_c, UNIT: tl.constexpr):
    """Strides in elements; channels lie side by side where the UNIT is not 1."""
    s_v = tl.cast(s_v, tl.int64) * UNIT
    s_n = tl.cast(s_n, tl.int64) * UNIT
    s_l = tl.cast(s_l, tl.int64) * UNIT
    if UNIT > 1:
        s_c = 1
    return s_v, s_n, s_l, s_c


@triton.jit(do_not_specialize=SIZES)
def match_kernel(
    a, b, row_keys, column_keys, views_b, batch, rows_a, rows_b, dim, tiles,
    sa_v, sa_n, sa_l, sa_c, sb_v, sb_n, sb_l, sb_c,
    UNIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """row_keys [S, L1]: the least key of each position of a; column_keys [S, tiles of a, L2]."""
    dim *= UNIT
    sa_v, sa_n, sa_l, sa_c = strides_of(sa_v, sa_n, sa_l, sa_c, UNIT)
    sb_v, sb_n, sb_l, sb_c = strides_of(sb_v, sb_n, sb_l, sb_c, UNIT)
    tile = tl.program_id(0) % tiles
    s = tl.program_id(0) // tiles
    n = (s % batch).to(tl.int64)
    u = (s // batch // views_b).to(tl.int64)
    v = (s // batch % views_b).to(tl.int64)
    i = tile * A + tl.arange(0, A)
    k = tl.arange(0, C)
    wide = k.to(tl.int64)[None, None, :]
    a_at = a + u * sa_v + n * sa_n + i.to(tl.int64)[:, None, None] * sa_l + wide * sa_c
    b_at = b + v * sb_v + n * sb_n
    i_live = (i < rows_a)[:, None, None]
    nearest = tl.full((A,), NO_KEY, tl.int64)
    for first in range(0, rows_b, B):
        j = first + tl.arange(0, B)
        j_live = (j < rows_b)[None, :, None]
        here = b_at + j.to(tl.int64)[None, :, None] * sb_l + wide * sb_c
        sums = tl.zeros((A, B, C), tl.float32)
        for c in range(0, dim, C):
            live = (c + k < dim)[None, None, :]
            at = tl.cast(c, tl.int64)
            x = tl.load(a_at + at * sa_c, mask=i_live & live, other=0.0).to(tl.float32)
            y = tl.load(here + at * sb_c, mask=j_live & live, other=0.0).to(tl.float32)
            difference = x - y
            sums += difference * difference
        distance = tl.sum(sums, axis=2)
        own = tl.where((j < rows_b)[None, :], keys_of(distance, j[None, :]), NO_KEY)
        nearest = tl.minimum(nearest, tl.min(own, axis=1))
        other = tl.where((i < rows_a)[:, None], keys_of(distance, i[:, None]), NO_KEY)
        at = column_keys + (s.to(tl.int64) * tiles + tile) * rows_b + j
        tl.store(at, tl.min(other, axis=0), mask=j < rows_b)
    tl.store(row_keys + s.to(tl.int64) * rows_a + i, nearest, mask=i < rows_a)


@triton.jit
def merged(keys, index, length, tiles, BLOCK: tl.constexpr):
    """keys: [tiles, length] of a sample; the least of each index."""
    least = tl.full((BLOCK,), NO_KEY, tl.int64)
    for t in range(0, tiles):
        at = keys + tl.cast(t, tl.int64) * length + index
        least = tl.minimum(least, tl.load(at, mask=index < length, other=NO_KEY))
    return least


@triton.jit
def ranked(key, index):
    """What orders the indices: their distance, then themselves."""
    return ((key >> 32) << 32) | index.to(tl.int64)


@triton.jit
def rank_side(keys, nearest, rank, s, block, length, tiles, BLOCK: tl.constexpr):
    keys += s * tiles * length
    i = block * BLOCK + tl.arange(0, BLOCK)
    own = merged(keys, i, length, tiles, BLOCK)
    at = s * length + i
    tl.store(nearest + at, (own & 0xFFFFFFFF).to(tl.int32), mask=i < length)
    own = ranked(own, i)
    lower = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, length, BLOCK):
        j = first + tl.arange(0, BLOCK)
        other = ranked(merged(keys, j, length, tiles, BLOCK), j)  # past the last: above all others
        lower += tl.sum((other[None, :] < own[:, None]).to(tl.int32), axis=1)
    tl.store(rank + at, lower, mask=i < length)


@triton.jit(do_not_specialize=SIZES)
def rank_kernel(
    row_keys, column_keys, nearest_a, rank_a, nearest_b, rank_b, rows_a, rows_b, tiles,
    blocks_a, blocks_b, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a block of positions of one side: for each sample, a's blocks, then b's."""
    s = (tl.program_id(0) // (blocks_a + blocks_b)).to(tl.int64)
    block = tl.program_id(0) % (blocks_a + blocks_b)
    if block < blocks_a:
        rank_side(row_keys, nearest_a, rank_a, s, block, rows_a, 1, BLOCK)
    else:
        rank_side(column_keys, nearest_b, rank_b, s, block - blocks_a, rows_b, tiles, BLOCK)
