"""The attention op's backward in Triton: no atomics, so two runs are bitwise equal.

With P = exp(s - lse), dS = P (dO V^T - delta), delta = rowsum(dO O):

    dV = P^T dO      dK = scale dS^T Q      dQ = scale dS K

Two launches. query_gradient_kernel runs over the keys that a tile of queries sees, three products
a pair of tiles, and leaves delta; key_gradient_kernel over the queries that see a tile of keys,
four. (delta_kernel forms delta where no dQ is needed.) P is formed from the saved lse, of base 2.
GPU times: not measured yet.

The scores and dO V^T are computed twice, 7 products for 5. What fusing dQ with dK and dV costs
instead, per element of a T x d operand, without atomics (estimates for an H100: 400 TFLOP/s
reached, 3 TB/s measured):

    two products saved                       4 T operations, T / 100 ps
    a float32 partial dQ a tile of 128 keys  8 T / 128 bytes written and read, T / 48 ps

so partial sums lose twofold at every T; they break even at tiles of 256 keys, whose dK and dV do
not fit the registers. One program a head that adds to its own dQ pays the same bytes to L2 (about
40 bytes a nanosecond a multiprocessor: at 303 tokens, d 64, 19 us against 8 saved), and Triton
cannot keep a dQ in shared memory that a loop indexes. Where that fits, up to 256 tokens in half
types, the CUDA backend does it, and it is the default there. Two loops in one launch save no
product.

Rotary position: queries and keys come turned, since each is loaded in some loop; that moves 4 T d
elements more, beside 12 without it. dQ and dK are turned back in float32 before they are stored.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.attention.triton.forward import live_keys, seen
from vicreg_kernels.attention.triton.rope import store_gradient
from vicreg_kernels.attention.triton.rules import (
    extents,
    key_intervals,
    key_tiles,
    padded,
    query_range,
    tile_start,
    tiles_of,
)
from vicreg_kernels.attention.triton.tiles import (
    VARYING,
    load_part,
    load_rows,
    product,
    rounded,
    store_part,
    strides,
)


@triton.jit
def peak_of(lse):
    """+inf for a query that sees nothing, so that exp2(s - peak) = 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit(do_not_specialize=VARYING)
def delta_kernel(
    grad, out, lse, delta, peak,
    heads, tokens, rows, sg_b, sg_h, sg_t, sg_d,
    ALIGNED: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta and peak (peak_of), float32 [B, H, T], where no dq is needed. Reads grad and out once,
    in out's order [B, T, H].
    """
    sg_b, sg_h, sg_t, sg_d = strides(sg_b, sg_h, sg_t, sg_d, ALIGNED)
    at = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    live = at < rows
    h = at % heads
    token = at // heads % tokens
    b = at // heads // tokens
    along = b * sg_b + h * sg_h + token * sg_t
    o = load_part(out, at * HEAD, live, 1, 0, WIDTH, HEAD, True).to(tl.float32)
    g = load_part(grad, along, live, sg_d, 0, WIDTH, HEAD, True).to(tl.float32)
    to = (b * heads + h) * tokens + token
    tl.store(delta + to, tl.sum(o * g, axis=1), mask=live)
    tl.store(peak + to, peak_of(tl.load(lse + to, mask=live, other=0.0)), mask=live)


@triton.jit
def from_queries(
    k1, k2, v1, v2, dk1, dk2, dv1, dv2, q, grad, peak, delta,
    key, start, limit, keys, bounds, blocks, frame, window, scale,
    sq_t, sq_d, sg_t, sg_d,
    MASKED: tl.constexpr, FRAMES: tl.constexpr, BLOCKS: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, QUERIES: tl.constexpr,
    FORMAT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What QUERIES queries from `start` on add to the gradients of a tile of keys."""
    local = tl.arange(0, QUERIES)
    row = start + local
    live = row < limit
    q1, q2 = load_rows(q, start, sq_t, sq_d, live, MASKED, HEAD, D1, D2, QUERIES, FORMAT)
    g1, g2 = load_rows(grad, start, sg_t, sg_d, live, MASKED, HEAD, D1, D2, QUERIES, FORMAT)
    s = product(k1, k2, q1, q2, D2 > 0, PRECISION) * scale  # [keys, queries]
    if MASKED:
        top = tl.load(peak + row, mask=live, other=float("inf"))
        if FRAMES or BLOCKS:
            begin, end, second, second_end = key_intervals(
                row, keys, bounds, blocks, frame, window, FRAMES, BLOCKS
            )
            mask = (key[:, None] >= begin[None, :]) & (key[:, None] < end[None, :])
            if BLOCKS:
                mask = mask | (
                    (key[:, None] >= second[None, :]) & (key[:, None] < second_end[None, :])
                )
            s = tl.where(mask, s, float("-inf"))
    else:
        top = tl.load(peak + row)
    p = tl.exp2(s - top[None, :])
    if NEED_V:
        lower = rounded(p, FORMAT)
        dv1 = tl.dot(lower, g1, dv1, input_precision=PRECISION)
        if D2:
            dv2 = tl.dot(lower, g2, dv2, input_precision=PRECISION)
    if NEED_K:
        dp = product(v1, v2, g1, g2, D2 > 0, PRECISION)
        drop = tl.load(delta + row, mask=live, other=0.0) if MASKED else tl.load(delta + row)
        ds = p * (dp - drop[None, :])
        if MASKED and (FRAMES or BLOCKS):  # a hidden value may be NaN
            ds = tl.where(mask, ds, 0.0)
        ds = rounded(ds, FORMAT)
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if D2:
            dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
    return dk1, dk2, dv1, dv2


@triton.jit(do_not_specialize=VARYING)
def key_gradient_kernel(
    grad, q, k, v, peak, delta, dk, dv,
    q_offsets, k_offsets, lengths, keep, bounds, table, q_index, k_index,
    samples, heads, tokens, all_keys, tiles, bounds_stride, blocks, frame, window, length_stride,
    q_indexed, q_index_stride, k_indexed, k_index_stride, frames, height, width, last, axes, part,
    sg_b, sg_h, sg_t, sg_d, sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d,
    sv_b, sv_h, sv_t, sv_d,
    scale,
    VARIED: tl.constexpr, KEEP: tl.constexpr, FRAMES: tl.constexpr, BLOCKS: tl.constexpr,
    TURNED: tl.constexpr,
    ALIGNED: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk, dv of KEYS keys, [B, T, H, d] in memory; hidden keys get zeros."""
    scale = tl.cast(scale, tl.float32)
    sg_b, sg_h, sg_t, sg_d = strides(sg_b, sg_h, sg_t, sg_d, ALIGNED)
    sq_b, sq_h, sq_t, sq_d = strides(sq_b, sq_h, sq_t, sq_d, ALIGNED)
    sk_b, sk_h, sk_t, sk_d = strides(sk_b, sk_h, sk_t, sk_d, ALIGNED)
    sv_b, sv_h, sv_t, sv_d = strides(sv_b, sv_h, sv_t, sv_d, ALIGNED)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    batch = tl.program_id(0) // tiles // heads
    sample, tile, q_begin, queries, k_begin, keys = extents(
        q_offsets, k_offsets, samples, tokens, all_keys, batch, tile, VARIED, False, KEYS
    )
    first = tile * KEYS
    if first >= keys:
        return
    key = first + tl.arange(0, KEYS)
    there = key < keys
    keys = padded(lengths, length_stride, sample, keys, VARIED)
    b = tl.cast(batch, tl.int64)
    h = tl.cast(head, tl.int64)
    q_at = tl.cast(q_begin, tl.int64)
    k_at = tl.cast(k_begin, tl.int64)
    q += b * sq_b + h * sq_h + q_at * sq_t
    grad += b * sg_b + h * sg_h + q_at * sg_t
    k += b * sk_b + h * sk_h + k_at * sk_t
    v += b * sv_b + h * sv_h + k_at * sv_t
    peak += (b * heads + h) * tokens + q_at
    delta += (b * heads + h) * tokens + q_at
    bounds += sample * bounds_stride
    q_index += b * q_index_stride
    k_index += b * k_index_stride

    live = live_keys(keep + b * all_keys, key, keys, KEEP)
    k1, k2 = load_rows(k, first, sk_t, sk_d, live, True, HEAD, D1, D2, KEYS, FORMAT)
    v1, v2 = load_rows(v, first, sv_t, sv_d, live, True, HEAD, D1, D2, KEYS, FORMAT)
    low, high, whole, whole_end = query_range(
        first, tl.minimum(first + KEYS, keys) - 1, queries, bounds, blocks, frame, window,
        FRAMES, BLOCKS,
    )  # fmt: skip
    high = tl.where(first < keys, high, 0)
    masked, lead, count = tiles_of(low, high, whole, whole_end, QUERIES)
    dk1 = tl.zeros((KEYS, D1), tl.float32)
    dv1 = tl.zeros((KEYS, D1), tl.float32)
    dk2 = tl.zeros((KEYS,), tl.float32)
    dv2 = dk2
    if D2:
        dk2 = tl.zeros((KEYS, D2), tl.float32)
        dv2 = tl.zeros((KEYS, D2), tl.float32)
    for t in range(0, masked):
        start = tile_start(t, low, lead, count, True, QUERIES)
        dk1, dk2, dv1, dv2 = from_queries(
            k1, k2, v1, v2, dk1, dk2, dv1, dv2, q, grad, peak, delta,
            key, start, high, keys, bounds, blocks, frame, window, scale,
            sq_t, sq_d, sg_t, sg_d,
            True, FRAMES, BLOCKS, NEED_K, NEED_V,
            HEAD, D1, D2, QUERIES, FORMAT, PRECISION,
        )  # fmt: skip
    for t in range(0, count):
        start = tile_start(t, low, lead, count, False, QUERIES)
        dk1, dk2, dv1, dv2 = from_queries(
            k1, k2, v1, v2, dk1, dk2, dv1, dv2, q, grad, peak, delta,
            key, start, high, keys, bounds, blocks, frame, window, scale,
            sq_t, sq_d, sg_t, sg_d,
            False, FRAMES, BLOCKS, NEED_K, NEED_V,
            HEAD, D1, D2, QUERIES, FORMAT, PRECISION,
        )  # fmt: skip

    along = key.to(tl.int64) * heads * HEAD
    shift = ((b * all_keys + k_at) * heads + h) * HEAD
    keeping = live[:, None]
    if NEED_V:
        store_part(dv + shift, along, there, tl.where(keeping, dv1, 0.0), 0, HEAD, FORMAT)
        if D2:
            store_part(dv + shift, along, there, tl.where(keeping, dv2, 0.0), D1, HEAD, FORMAT)
    if NEED_K:
        scale *= 0.6931471805599453
        dk1 = tl.where(keeping, dk1 * scale, 0.0)
        if D2:
            dk2 = tl.where(keeping, dk2 * scale, 0.0)
        store_gradient(
            dk + shift, along, there, dk1, dk2, key, table, k_index, k_indexed > 0, k_begin,
            frames, height, width, last, axes, part, TURNED, HEAD, D1, D2, FORMAT,
        )  # fmt: skip


@triton.jit
def from_keys(
    q1, q2, g1, g2, dq1, dq2, top, drop, k, v, keep,
    start, limit, begin, end, scale,
    sk_t, sk_d, sv_t, sv_d,
    MASKED: tl.constexpr, RULED: tl.constexpr, KEEP: tl.constexpr,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, KEYS: tl.constexpr,
    FORMAT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What KEYS keys from `start` on add to the gradient of a tile of queries."""
    key = start + tl.arange(0, KEYS)
    live = key < limit
    if MASKED:
        live = live_keys(keep, key, limit, KEEP)
    k1, k2 = load_rows(k, start, sk_t, sk_d, live, MASKED, HEAD, D1, D2, KEYS, FORMAT)
    v1, v2 = load_rows(v, start, sv_t, sv_d, live, MASKED, HEAD, D1, D2, KEYS, FORMAT)
    s = product(q1, q2, k1, k2, D2 > 0, PRECISION) * scale
    if MASKED:
        mask = seen(key, live, begin, end, RULED)
        s = tl.where(mask, s, float("-inf"))
    p = tl.exp2(s - top[:, None])
    ds = p * (product(g1, g2, v1, v2, D2 > 0, PRECISION) - drop[:, None])
    if MASKED:
        ds = tl.where(mask, ds, 0.0)
    ds = rounded(ds, FORMAT)
    dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    if D2:
        dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
    return dq1, dq2


@triton.jit(do_not_specialize=VARYING)
def query_gradient_kernel(
    grad, q, k, v, peak, delta, out, lse, dq,
    q_offsets, k_offsets, lengths, keep, bounds, table, q_index, k_index,
    samples, heads, tokens, all_keys, tiles, bounds_stride, blocks, frame, window, length_stride,
    q_indexed, q_index_stride, k_indexed, k_index_stride, frames, height, width, last, axes, part,
    sg_b, sg_h, sg_t, sg_d, sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d,
    sv_b, sv_h, sv_t, sv_d,
    scale,
    VARIED: tl.constexpr, KEEP: tl.constexpr, FRAMES: tl.constexpr, BLOCKS: tl.constexpr,
    TURNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq of QUERIES queries, [B, T, H, d] in memory; delta and peak for key_gradient_kernel."""
    scale = tl.cast(scale, tl.float32)
    sg_b, sg_h, sg_t, sg_d = strides(sg_b, sg_h, sg_t, sg_d, ALIGNED)
    sq_b, sq_h, sq_t, sq_d = strides(sq_b, sq_h, sq_t, sq_d, ALIGNED)
    sk_b, sk_h, sk_t, sk_d = strides(sk_b, sk_h, sk_t, sk_d, ALIGNED)
    sv_b, sv_h, sv_t, sv_d = strides(sv_b, sv_h, sv_t, sv_d, ALIGNED)
    RULED: tl.constexpr = FRAMES or BLOCKS
    tile = tl.program_id(0) % tiles
    if FRAMES:
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
    grad += b * sg_b + h * sg_h + q_at * sg_t
    k += b * sk_b + h * sk_h + k_at * sk_t
    v += b * sv_b + h * sv_h + k_at * sv_t
    if KEEP:
        keep += b * all_keys
    bounds += sample * bounds_stride
    q_index += b * q_index_stride
    k_index += b * k_index_stride

    row = first + tl.arange(0, QUERIES)
    live = row < queries
    q1, q2 = load_rows(q, first, sq_t, sq_d, live, True, HEAD, D1, D2, QUERIES, FORMAT)
    g1, g2 = load_rows(grad, first, sg_t, sg_d, live, True, HEAD, D1, D2, QUERIES, FORMAT)
    at = (b * heads + h) * tokens + q_at + row
    along = row.to(tl.int64) * heads * HEAD
    shift = ((b * tokens + q_at) * heads + h) * HEAD
    o1 = load_part(out + shift, along, live, 1, 0, D1, HEAD, True).to(tl.float32)
    drop = tl.sum(o1 * g1.to(tl.float32), axis=1)
    if D2:
        o2 = load_part(out + shift, along, live, 1, D1, D2, HEAD, True).to(tl.float32)
        drop += tl.sum(o2 * g2.to(tl.float32), axis=1)
    top = peak_of(tl.load(lse + at, mask=live, other=float("-inf")))
    tl.store(delta + at, drop, mask=live)
    tl.store(peak + at, top, mask=live)
    begin, end, second, second_end = key_intervals(
        tl.minimum(row, queries - 1), keys, bounds, blocks, frame, window, FRAMES, BLOCKS
    )
    low, high, masked, lead, whole, low2, high2, masked2, lead2, whole2 = key_tiles(
        begin, end, second, second_end, keys, RULED, BLOCKS, KEEP, KEYS
    )
    dq1 = tl.zeros((QUERIES, D1), tl.float32)
    dq2 = top
    if D2:
        dq2 = tl.zeros((QUERIES, D2), tl.float32)
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
        dq1, dq2 = from_keys(
            q1, q2, g1, g2, dq1, dq2, top, drop, k, v, keep,
            start, limit, row_begin, row_end, scale,
            sk_t, sk_d, sv_t, sv_d,
            True, RULED, KEEP, HEAD, D1, D2, KEYS, FORMAT, PRECISION,
        )  # fmt: skip
    for t in range(0, whole + whole2):
        start = tile_start(t, low, lead, whole, False, KEYS)
        if BLOCKS:
            start = tl.where(
                t >= whole, tile_start(t - whole, low2, lead2, whole2, False, KEYS), start
            )
        dq1, dq2 = from_keys(
            q1, q2, g1, g2, dq1, dq2, top, drop, k, v, keep,
            start, start + KEYS, begin, end, scale,
            sk_t, sk_d, sv_t, sv_d,
            False, RULED, KEEP, HEAD, D1, D2, KEYS, FORMAT, PRECISION,
        )  # fmt: skip

    scale *= 0.6931471805599453
    dq1 *= scale
    if D2:
        dq2 *= scale
    store_gradient(
        dq + shift, along, live, dq1, dq2,
        row, table, q_index, q_indexed > 0, q_begin,
        frames, height, width, last, axes, part, TURNED, HEAD, D1, D2, FORMAT,
    )  # fmt: skip
