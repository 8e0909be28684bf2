"""What the Triton products of the VICReg op multiply, and how.

Operands are centred values in the FORMAT of the tensor-core path,

    "fp32"  as they are (precision tf32x3 or ieee)      "bf16"  rounded to bfloat16
    "tf32"  rounded to 10 bits, kept in float32         "fp16"  halved, rounded to float16

and `value` is the number an operand stands for. Halving keeps the difference of two float16 numbers
inside float16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_tf32(z):
    """The nearest number with 10 fraction bits; the tensor core alone would truncate."""
    wide = z * 8193.0
    return wide - (wide - z)


@triton.jit
def operand(centred, FORMAT: tl.constexpr):
    if FORMAT == "bf16":
        return centred.to(tl.bfloat16)
    elif FORMAT == "fp16":
        return (centred * 0.5).to(tl.float16)
    elif FORMAT == "tf32":
        return round_tf32(centred)
    else:
        return centred


@triton.jit
def value(centred, FORMAT: tl.constexpr):
    rounded = operand(centred, FORMAT).to(tl.float32)
    return rounded * 2.0 if FORMAT == "fp16" else rounded


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """acc + a b in float32. WIDEN: the interpreter multiplies bfloat16 by its bit patterns."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
