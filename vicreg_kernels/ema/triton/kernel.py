"""The EMA op's one Triton kernel: table in, tensors of one pair of dtypes updated in place.

What a tensor's row says at run time costs no compilation: the shadow's dtype, the dimensions and
their number. The dtypes of target and online tensor are compiled for, because a branch between two
loads would make the second wait for the first.

bfloat16 is read and written as integers, with the rounding of formula.h, because Triton's
interpreter rounds it otherwise. The launcher forbids fused multiply-adds, so that every backend has
the same bits.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer  # the cast forgets it


@triton.jit
def _read(address, at, mask, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    if KIND == "fp32":
        return tl.load(_pointer(address, tl.float32, ALIGNED) + at, mask=mask, other=0.0)
    elif KIND == "bf16":
        bits = tl.load(_pointer(address, tl.int16, ALIGNED) + at, mask=mask, other=0)
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        half = tl.load(_pointer(address, tl.float16, ALIGNED) + at, mask=mask, other=0.0)
        return half.to(tl.float32)


@triton.jit
def _bits(value):
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def _widen_bfloat16(rounded):
    return (rounded & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _write(address, at, value, mask, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """To nearest, ties to even. Returns what was stored, as float32."""
    if KIND == "fp32":
        tl.store(_pointer(address, tl.float32, ALIGNED) + at, value, mask=mask)
        return value
    elif KIND == "bf16":
        bits = _bits(value)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, rounded).to(tl.uint32)
        _store_bits(address, at, rounded >> 16, mask, ALIGNED)
        return _widen_bfloat16(rounded)
    else:
        half = value.to(tl.float16)
        tl.store(_pointer(address, tl.float16, ALIGNED) + at, half, mask=mask)
        return half.to(tl.float32)


@triton.jit
def _store_bits(address, at, bits, mask, ALIGNED: tl.constexpr):
    tl.store(_pointer(address, tl.int16, ALIGNED) + at, bits.to(tl.int16), mask=mask)


@triton.jit
def _write_stochastic(address, at, value, random, mask, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """formula.h's stochastic_bfloat16 and stochastic_float16. random: uint32, 16 bits."""
    bits = _bits(value)
    size = bits & 0x7FFFFFFF
    nan = size > 0x7F800000
    if KIND == "bf16":
        rounded = tl.where(nan, 0x7FC00000, bits + random).to(tl.uint32)
        _store_bits(address, at, rounded >> 16, mask, ALIGNED)
        return _widen_bfloat16(rounded)
    else:
        up = size + (random >> 3)
        normal = tl.where(up >= 0x47800000, 0x7C00, (up - 0x38000000) >> 13).to(tl.uint32)
        tiny = size < 0x38800000
        steps = tl.where(tiny, tl.abs(value), 0.0) * 16777216.0
        whole = steps.to(tl.int32)
        rest = ((steps - whole.to(tl.float32)) * 65536.0).to(tl.int32)
        subnormal = (whole + (random.to(tl.int32) < rest).to(tl.int32)).to(tl.uint32)
        half = ((bits >> 16) & 0x8000) | tl.where(tiny, subnormal, normal)
        half = tl.where(nan, 0x7E00, half).to(tl.uint32)
        _store_bits(address, at, half, mask, ALIGNED)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _random(seed, step, index, first, BLOCK: tl.constexpr):
    """reference.py's random_bits of elements first to first + BLOCK - 1: uint32 [BLOCK]."""
    group = first // 8 + tl.arange(0, BLOCK // 8)  # int64
    zero = group * 0
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (((group >> 32) & 0xFFFF) | (((step >> 32) & 0xFFFF) << 16)).to(tl.uint32)
    tensor = (zero + index).to(tl.uint32)
    now = ((zero + step) & 0xFFFFFFFF).to(tl.uint32)
    x, y, z, w = tl.philox(seed, low, high, tensor, now)
    # element = 4 b2 + 2 b1 + b0 of its group: word 2 b2 + b1, half b0
    even = tl.join(tl.join(x & 0xFFFF, z & 0xFFFF), tl.join(y & 0xFFFF, w & 0xFFFF))
    odd = tl.join(tl.join(x >> 16, z >> 16), tl.join(y >> 16, w >> 16))
    return tl.reshape(tl.join(even, odd), [BLOCK])


@triton.jit
def _write_shadow(address, at, value, mask, kind, ALIGNED: tl.constexpr):
    """kind: launch.py's SHADOWS; 0: there is none."""
    if kind == 1:
        _write(address, at, value, mask, "fp32", ALIGNED)
    elif kind == 2:
        _write(address, at, value, mask, "bf16", ALIGNED)
    elif kind == 3:
        _write(address, at, value, mask, "fp16", ALIGNED)


@triton.jit(do_not_specialize=["near", "seed", "step", "rows", "blocks", "dims"])
def update_kernel(
    table,  # int64: rows of this launch from `rows` on, its programs' places from `blocks` on
    momentum,
    step_at,
    factor,
    near: tl.int32,
    seed: tl.int64,
    step: tl.int64,
    rows: tl.int64,
    blocks: tl.int64,
    dims: tl.int32,  # 0: each tensor is one run of memory, as always where ALIGNED
    TARGET: tl.constexpr,
    ONLINE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DEVICE_MOMENTUM: tl.constexpr,
    DEVICE_STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.load(table + blocks + tl.program_id(0))
    # addresses, elements, index, number of the first, kind of the shadow, dims
    row = table + rows + (place >> 32) * (7 + 4 * dims)
    first = (place & 0xFFFFFFFF) * BLOCK
    target, online, shadow = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    elements, index, number = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    kind = tl.load(row + 6)
    if ALIGNED:
        elements = tl.multiple_of(elements, 8)  # so that a mask does not cut a vector
    element = first + tl.arange(0, BLOCK)
    mask = element < elements
    at_target, at_online, at_shadow = element, element, element
    if not ALIGNED:
        at = tl.where(dims == 0, element, 0)
        at_target, at_online, at_shadow = at, at, at
        rest = element
        for d in range(dims):  # the innermost first
            size = tl.load(row + 7 + 4 * d)
            coordinate = rest % size
            rest = rest // size
            at_target += coordinate * tl.load(row + 8 + 4 * d)
            at_online += coordinate * tl.load(row + 9 + 4 * d)
            at_shadow += coordinate * tl.load(row + 10 + 4 * d)

    if DEVICE_MOMENTUM:
        m = tl.load(momentum).to(tl.float64)
        is_near = 1.0 - m < 0.5
        scale = tl.where(is_near, 1.0 - m, -m).to(tl.float32)
    else:
        scale = tl.full([], factor, tl.float32)
        is_near = tl.full([], near, tl.int32) != 0
    t = _read(target, at_target, mask, TARGET, ALIGNED)
    o = _read(online, at_online, mask, ONLINE, ALIGNED)
    result = tl.where(is_near, t, o) + scale * (o - t)
    if STOCHASTIC:
        now = tl.load(step_at) if DEVICE_STEP else tl.full([], step, tl.int64)
        random = _random(seed, now, index, number + first, BLOCK)
        kept = _write_stochastic(target, at_target, result, random, mask, TARGET, ALIGNED)
    else:
        kept = _write(target, at_target, result, mask, TARGET, ALIGNED)
    _write_shadow(shadow, at_shadow, kept, mask, kind, ALIGNED)
