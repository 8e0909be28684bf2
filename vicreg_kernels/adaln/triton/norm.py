"""The modulated layer norm in Triton: one pass over tokens forward, one over tokens and gradients
backward.

A program keeps a token in registers. Forward it takes one: 2 e D bytes. Backward it takes a part of
a frame's tokens, one after the other, and keeps what they add to the gradients of shift and scale:
3 e D bytes a token; `vectors_finish_kernel` adds up the parts of a frame in order. GPU times: not
measured yet.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.core.triton.operands import round_if
from vicreg_kernels.core.triton.strides import across, along, row_at

# What no kernel is specialised on.
SIZES = ["tokens", "dim", "sx_f", "sx_t", "sx_d", "sc_f", "sc_d"]


@triton.jit(
    do_not_specialize=[*SIZES, "sh_f", "sh_d"],
    do_not_specialize_on_alignment=["x", "shift", "scale"],
)
def norm_kernel(
    x, shift, scale, out, saved, tokens, dim, sx_f, sx_t, sx_d, sh_f, sh_d, sc_f, sc_d, eps,
    UNIT: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a token; saved: [G, T, 2]. dim and strides: in UNITs."""
    dim *= UNIT
    eps = tl.cast(eps, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    frame = row // tokens
    column = tl.arange(0, BLOCK)
    inside = column < dim
    wide = column.to(tl.int64)
    at = row_at(x, frame * across(sx_f, UNIT) + (row % tokens) * across(sx_t, UNIT), UNIT)
    value = tl.load(at + wide * along(sx_d, UNIT), mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=0) / dim
    deviation = tl.where(inside, value - mean, 0.0)
    variance = tl.sum(deviation * deviation, axis=0) / dim
    # Infinity less itself is NaN: where float32 does not hold the squares nothing is known.
    rstd = 1.0 / tl.sqrt(variance + eps) + (variance - variance)
    at = row_at(scale, frame * across(sc_f, UNIT), UNIT)
    factor = tl.load(at + wide * along(sc_d, UNIT), mask=inside, other=0.0).to(tl.float32)
    at = row_at(shift, frame * across(sh_f, UNIT), UNIT)
    moved = tl.load(at + wide * along(sh_d, UNIT), mask=inside, other=0.0).to(tl.float32)
    value = deviation * rstd * (1.0 + factor) + moved
    tl.store(out + row * dim + column, round_if(value, out, ROUND), mask=inside)
    tl.store(saved + 2 * row, mean)
    tl.store(saved + 2 * row + 1, rstd)


@triton.jit(
    do_not_specialize=[*SIZES, "frames", "parts", "part_tokens", "sg_f", "sg_t", "sg_d"],
    do_not_specialize_on_alignment=["grad", "x", "scale"],
)
def norm_gradient_kernel(
    grad, x, scale, saved, to_x, to_shift, to_scale, frames, tokens, dim, parts, part_tokens,
    sg_f, sg_t, sg_d, sx_f, sx_t, sx_d, sc_f, sc_d,
    FRAMES: tl.constexpr, NEED_X: tl.constexpr, NEED_VECTORS: tl.constexpr, UNIT: tl.constexpr,
    ROUND: tl.constexpr, ROUND_VECTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a part of a frame, whose sums are row program_id of to_shift and to_scale; or,
    where a frame has one token (not FRAMES), a part of all tokens, each with its own vectors.
    """
    dim *= UNIT
    block = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    wide = column.to(tl.int64)
    frame = block // parts
    begin = (block % parts) * part_tokens
    end = tl.minimum(begin + part_tokens, tokens if FRAMES else frames)
    by_shift = tl.zeros((BLOCK,), tl.float32)
    by_scale = tl.zeros((BLOCK,), tl.float32)
    for row in range(begin, end):
        token = row if FRAMES else row * 0
        own = frame if FRAMES else row
        at = row_at(scale, own * across(sc_f, UNIT), UNIT)
        factor = tl.load(at + wide * along(sc_d, UNIT), mask=inside, other=0.0).to(tl.float32)
        at = row_at(grad, own * across(sg_f, UNIT) + token * across(sg_t, UNIT), UNIT)
        g = tl.load(at + wide * along(sg_d, UNIT), mask=inside, other=0.0).to(tl.float32)
        at = row_at(x, own * across(sx_f, UNIT) + token * across(sx_t, UNIT), UNIT)
        n = tl.load(at + wide * along(sx_d, UNIT), mask=inside, other=0.0).to(tl.float32)
        place = own * tokens + token
        rstd = tl.load(saved + 2 * place + 1)
        n = tl.where(inside, (n - tl.load(saved + 2 * place)) * rstd, 0.0)
        if NEED_X:
            s = g * (1.0 + factor)
            a = tl.sum(s, axis=0) / dim
            b = tl.sum(s * n, axis=0) / dim
            slope = rstd * (s - a - b * n)
            tl.store(to_x + place * dim + column, round_if(slope, to_x, ROUND), mask=inside)
        if NEED_VECTORS:
            if FRAMES:
                by_shift += g
                by_scale += g * n
            else:
                to = own * dim + column
                tl.store(to_shift + to, round_if(g, to_shift, ROUND_VECTORS), mask=inside)
                tl.store(to_scale + to, round_if(g * n, to_scale, ROUND_VECTORS), mask=inside)
    if FRAMES and NEED_VECTORS:
        to = block * dim + column
        tl.store(to_shift + to, round_if(by_shift, to_shift, ROUND_VECTORS), mask=inside)
        tl.store(to_scale + to, round_if(by_scale, to_scale, ROUND_VECTORS), mask=inside)


@triton.jit(do_not_specialize=["count", "dim", "parts"])
def vectors_finish_kernel(
    sums, out, count, dim, parts, ROUND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [G, D] from sums [G * parts, D], in the order of the parts. count: G D."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    first = (at // dim) * parts * dim + at % dim
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(sums + first + tl.cast(part, tl.int64) * dim, mask=inside, other=0.0)
    tl.store(out + at, round_if(total, out, ROUND), mask=inside)
