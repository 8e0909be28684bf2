"""The attention op's forward in Triton: one program for a tile of queries of one head.

4 T^2 d operations over visible tiles a head against (3 + 1) T d elements moved: below about 300
tokens (bf16 on an H100) memory is the floor, above it the products and the T^2 exponentials are.
Keys are visited in two loops, the tiles that a rule cuts first, under a mask, then the whole ones,
which take none; what no row of the tile sees is not visited. Softmax runs online in log2 (Dao et
al., 2022, arXiv:2205.14135). GPU times: not measured yet.

With rotary position queries are turned once, in the prologue. Keys: a tile of 64 x 64 turned in the
loop costs about 400 cycles of a multiprocessor (12 operations an element, 12 bytes an element from
L1) and takes its load out of the pipeline, against the 500 of its products; turned beforehand, a
read and a write of every key, about 1100 cycles of memory, once. So keys are turned in the loop
where at most two tiles of queries visit them, else by rotate_kernel into scratch.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.attention.triton.rope import load_turned
from vicreg_kernels.attention.triton.rules import (
    extents,
    key_intervals,
    key_tiles,
    padded,
    tile_start,
)
from vicreg_kernels.attention.triton.tiles import (
    VARYING,
    load_rows,
    product,
    rounded,
    store_part,
    strides,
)


@triton.jit
def seen(key, live, begin, end, RULED: tl.constexpr):
    """bool [Q or 1, K]: whether a row's interval has a key; live [K]: keys that are there."""
    mask = live[None, :]
    if RULED:
        mask = mask & (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
    return mask


@triton.jit
def live_keys(keep, key, end, KEEP: tl.constexpr):
    live = key < end
    if KEEP:
        live = live & (tl.load(keep + key, mask=live, other=0) != 0)
    return live


@triton.jit
def attend(
    q1, q2, acc1, acc2, top, total, k, v, keep, table, k_index, k_indexed, k_at,
    start, limit, begin, end, scale,
    sk_t, sk_d, sv_t, sv_d, frames, height, width, last, axes, part,
    MASKED: tl.constexpr, RULED: tl.constexpr, KEEP: tl.constexpr, TURNED: tl.constexpr,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, KEYS: tl.constexpr,
    FORMAT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys from `start` on; top and total: the rows' maximum and sum, in log2.

    An infinite score becomes NaN, by 0 times infinity: a sum that is -inf on its way would leave
    its key out. (float16 holds no numbers whose products are so large.)
    """
    key = start + tl.arange(0, KEYS)
    live = key < limit
    if MASKED:
        live = live_keys(keep, key, limit, KEEP)
    k1, k2 = load_turned(
        k, start, sk_t, sk_d, live, table, k_index, k_indexed > 0, k_at,
        frames, height, width, last, axes, part, TURNED, MASKED, HEAD, D1, D2, KEYS, FORMAT,
    )  # fmt: skip
    s = product(q1, q2, k1, k2, D2 > 0, PRECISION)
    if MASKED:
        mask = seen(key, live, begin, end, RULED)
        s *= scale
        if FORMAT != "fp16":
            s += s * 0.0
        s = tl.where(mask, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(top - base)
    else:
        if FORMAT != "fp16":
            s += s * 0.0
        new = tl.maximum(top, tl.max(s, axis=1) * scale)
        p = tl.exp2(s * scale - new[:, None])
        fade = tl.exp2(top - new)
    total = total * fade + tl.sum(p, axis=1)
    p = rounded(p, FORMAT)
    v1, v2 = load_rows(v, start, sv_t, sv_d, live, MASKED, HEAD, D1, D2, KEYS, FORMAT)
    acc1 = tl.dot(p, v1, acc1 * fade[:, None], input_precision=PRECISION)
    if D2:
        acc2 = tl.dot(p, v2, acc2 * fade[:, None], input_precision=PRECISION)
    return acc1, acc2, new, total


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q, k, v, out, lse, q_offsets, k_offsets, lengths, keep, bounds, table, q_index, k_index,
    samples, heads, tokens, all_keys, tiles, bounds_stride, blocks, frame, window, length_stride,
    q_indexed, q_index_stride, k_indexed, k_index_stride, frames, height, width, last, axes, part,
    sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, sv_b, sv_h, sv_t, sv_d,
    scale,
    VARIED: tl.constexpr, KEEP: tl.constexpr, FRAMES: tl.constexpr, BLOCKS: tl.constexpr,
    TURNED: tl.constexpr,
    ALIGNED: tl.constexpr, TURN_KEYS: tl.constexpr, NEGATE: tl.constexpr,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out: [B, T, H, d] in memory; lse: float32 [B, H, T], base 2. scale: |scale| log2(e); NEGATE:
    scale is negative, so queries are negated. TURN_KEYS: keys come unturned.
    """
    scale = tl.cast(scale, tl.float32)
    sq_b, sq_h, sq_t, sq_d = strides(sq_b, sq_h, sq_t, sq_d, ALIGNED)
    sk_b, sk_h, sk_t, sk_d = strides(sk_b, sk_h, sk_t, sk_d, ALIGNED)
    sv_b, sv_h, sv_t, sv_d = strides(sv_b, sv_h, sv_t, sv_d, ALIGNED)
    RULED: tl.constexpr = FRAMES or BLOCKS
    tile = tl.program_id(0) % tiles
    if FRAMES:  # late tiles see most: the longest first
        tile = tiles - 1 - tile
    head = tl.program_id(0) // tiles % heads
    batch = tl.program_id(0) // tiles // heads
    sample, tile, q_begin, queries, k_begin, keys = extents(
        q_offsets, k_offsets, samples, tokens, all_keys, batch, tile, VARIED, True, QUERIES
    )
    first = tile * QUERIES
    if first >= queries:
        return
    keys = padded(lengths, length_stride, sample, keys, VARIED)
    b = tl.cast(batch, tl.int64)
    h = tl.cast(head, tl.int64)
    q_at = tl.cast(q_begin, tl.int64)
    k_at = tl.cast(k_begin, tl.int64)
    q += b * sq_b + h * sq_h + q_at * sq_t
    k += b * sk_b + h * sk_h + k_at * sk_t
    v += b * sv_b + h * sv_h + k_at * sv_t
    if KEEP:
        keep += b * all_keys
    bounds += sample * bounds_stride
    k_index += b * k_index_stride

    row = first + tl.arange(0, QUERIES)
    live = row < queries
    q1, q2 = load_turned(
        q, first, sq_t, sq_d, live, table, q_index + b * q_index_stride, q_indexed > 0, q_begin,
        frames, height, width, last, axes, part, TURNED, True, HEAD, D1, D2, QUERIES, FORMAT,
    )  # fmt: skip
    if NEGATE:
        q1 = -q1
        if D2:
            q2 = -q2
    # Rows past the end stand for the last one, so that they add no tile.
    begin, end, second, second_end = key_intervals(
        tl.minimum(row, queries - 1), keys, bounds, blocks, frame, window, FRAMES, BLOCKS
    )
    low, high, masked, lead, whole, low2, high2, masked2, lead2, whole2 = key_tiles(
        begin, end, second, second_end, keys, RULED, BLOCKS, KEEP, KEYS
    )
    acc1 = tl.zeros((QUERIES, D1), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc2 = total
    if D2:
        acc2 = tl.zeros((QUERIES, D2), tl.float32)
    KEYS_TURNED: tl.constexpr = TURNED if TURN_KEYS else 0
    for t in range(0, masked + masked2):
        start = tile_start(t, low, lead, whole, True, KEYS)
        limit = high
        row_begin = begin
        row_end = end
        if BLOCKS:
            own = t >= masked
            start = tl.where(own, tile_start(t - masked, low2, lead2, whole2, True, KEYS), start)
            limit = tl.where(own, high2, high)
            row_begin = tl.where(own, second, begin)
            row_end = tl.where(own, second_end, end)
        acc1, acc2, top, total = attend(
            q1, q2, acc1, acc2, top, total, k, v, keep, table, k_index, k_indexed, k_begin,
            start, limit, row_begin, row_end, scale,
            sk_t, sk_d, sv_t, sv_d, frames, height, width, last, axes, part,
            True, RULED, KEEP, KEYS_TURNED, HEAD, D1, D2, KEYS, FORMAT, PRECISION,
        )  # fmt: skip
    for t in range(0, whole + whole2):
        start = tile_start(t, low, lead, whole, False, KEYS)
        if BLOCKS:
            start = tl.where(
                t >= whole, tile_start(t - whole, low2, lead2, whole2, False, KEYS), start
            )
        acc1, acc2, top, total = attend(
            q1, q2, acc1, acc2, top, total, k, v, keep, table, k_index, k_indexed, k_begin,
            start, start + KEYS, begin, end, scale,
            sk_t, sk_d, sv_t, sv_d, frames, height, width, last, axes, part,
            False, RULED, KEEP, KEYS_TURNED, HEAD, D1, D2, KEYS, FORMAT, PRECISION,
        )  # fmt: skip

    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    target = out + ((b * tokens + q_at) * heads + h) * HEAD
    along = row.to(tl.int64) * heads * HEAD
    store_part(target, along, live, acc1 * inverse[:, None], 0, HEAD, FORMAT)
    if D2:
        store_part(target, along, live, acc2 * inverse[:, None], D1, HEAD, FORMAT)
    logarithm = top + tl.log2(tl.where(total == 0.0, 1.0, total))
    tl.store(lse + (b * heads + h) * tokens + q_at + row, logarithm, mask=live)
