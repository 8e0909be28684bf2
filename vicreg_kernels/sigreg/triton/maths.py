"""What the SIGReg op's Triton kernels share: points of the unit circle, normal numbers, operands.

Triton's own sin and cos carry a slow path for huge angles that takes local memory, and its sqrt is
approximate; these are a dozen plain operations each, right to about one unit in the last place.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.core.triton.operands import round_to

# Chunks of knots that a launch can have: 64 knots in pairs, 8 a chunk.
MOST_CHUNKS: tl.constexpr = tl.constexpr(4)
MOST_KNOTS: tl.constexpr = tl.constexpr(64)
SINGLES: tl.constexpr = tl.constexpr(8)  # knots of any spacing that a pass over the rows takes
# What no kernel is specialised on.
SIZES = [
    "groups", "rows", "dim", "slices", "row_blocks", "knots", "chunks", "size",
    "s_g", "s_n", "s_d", "a_d", "a_m", "number", "key",
]  # fmt: skip


@triton.jit
def circle(p, high, low):
    """(cos, sin) of p t, where high + low = t 2 / pi as the sum of two floats.

    The angle is reduced in quarter turns by fused multiply-adds, so that what is left of it is as
    good as p itself. From 2^22 quarter turns on an angle in float32 says nothing, and the answer is
    some point of the circle; NaN and infinity give NaN.
    """
    shifted = tl.fma(p, high, 12582912.0)  # 1.5 2^23: leaves the nearest integer in the low bits
    rest = tl.fma(p, low, tl.fma(p, high, 12582912.0 - shifted))
    rest = tl.clamp(rest, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    x = rest * 1.5707963267948966
    y = x * x
    sine = tl.fma(y, -1.9515295891e-4, 8.3321608736e-3)
    sine = tl.fma(y, sine, -1.6666654611e-1)
    sine = tl.fma(x * y, sine, x)
    cosine = tl.fma(y, 2.443315711809948e-5, -1.388731625493765e-3)
    cosine = tl.fma(y, cosine, 4.166664568298827e-2)
    cosine = tl.fma(y * y, cosine, tl.fma(y, -0.5, 1.0))
    quarter = shifted.to(tl.int32, bitcast=True)
    swap = (quarter & 1) == 1
    c = tl.where(swap, sine, cosine)
    s = tl.where(swap, cosine, sine)
    c = tl.where(((quarter + 1) & 2) == 2, -c, c)
    s = tl.where((quarter & 2) == 2, -s, s)
    return c, s


@triton.jit
def rotate(c, s, by_c, by_s):
    """(c + i s) (by_c + i by_s)."""
    return tl.fma(c, by_c, -s * by_s), tl.fma(c, by_s, s * by_c)


@triton.jit
def twice(c, s):
    """Of twice the angle. 1 - 2 s^2 keeps the digits of a small angle, which c has lost."""
    s2 = s + s
    return tl.fma(-s2, s, 1.0), s2 * c


@triton.jit
def uniform(word):
    """formula.h's uniform: (word + 0.5) 2^-32 in float32, never 0, never 1."""
    u = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    return tl.minimum(u, 0.9999999403953552)


@triton.jit
def normals(seed, step, group):
    """The four normals of each group: Philox4x32-10 under the key `seed` at the counter
    (group, step), then Box-Muller. seed, step, group: int64.
    """
    now = tl.zeros_like(group) + step
    word0, word1, word2, word3 = tl.philox_impl(
        (group & 0xFFFFFFFF).to(tl.uint32),
        ((group >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (now & 0xFFFFFFFF).to(tl.uint32),
        ((now >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (seed & 0xFFFFFFFF).to(tl.uint32),
        ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    first = tl.sqrt_rn(-2.0 * tl.log(uniform(word0)))
    second = tl.sqrt_rn(-2.0 * tl.log(uniform(word2)))
    c0, s0 = circle(uniform(word1), 4.0, 0.0)  # 2 pi u is 4 u quarter turns
    c1, s1 = circle(uniform(word3), 4.0, 0.0)
    return first * c0, first * s0, second * c1, second * s1


@triton.jit
def operand(a, FORMAT: tl.constexpr):
    """A tile of z, of the directions or of the waves as the matrix instruction takes it."""
    if FORMAT == "tf32":  # the tensor core alone would truncate
        return round_to(a, 8193.0)
    elif FORMAT == "bf16 in fp32":  # see core/triton/operands.py
        return a.to(tl.float32)
    else:
        return a
