"""What Triton products multiply, and how; and how results are rounded.

Operands are centred values in the FORMAT of the tensor-core path,

    "fp32"  as they are (precision tf32x3 or ieee)      "bf16"  rounded to bfloat16
    "tf32"  rounded to 10 bits, kept in float32         "fp16"  halved, rounded to float16

and `value` is the number an operand stands for. Halving keeps the difference of two float16 numbers
inside float16. The interpreter truncates to bfloat16 and multiplies its bit patterns, so there
"bf16 in fp32" stands in: the same numbers, kept in float32.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to(z, SPLITTER: tl.constexpr):
    """Nearest number with 24 - s bits, SPLITTER = 2^s + 1 (Veltkamp); NaN and infinity give NaN."""
    wide = z * SPLITTER
    return wide - (wide - z)


@triton.jit
def operand(centred, FORMAT: tl.constexpr):
    if FORMAT == "bf16":
        return centred.to(tl.bfloat16)
    elif FORMAT == "bf16 in fp32":
        return round_to(centred, 65537.0)
    elif FORMAT == "fp16":
        return (centred * 0.5).to(tl.float16)
    elif FORMAT == "tf32":  # the tensor core alone would truncate
        return round_to(centred, 8193.0)
    else:
        return centred


@triton.jit
def value(centred, FORMAT: tl.constexpr):
    rounded = operand(centred, FORMAT).to(tl.float32)
    return rounded * 2.0 if FORMAT == "fp16" else rounded


@triton.jit
def square_operand(m, FORMAT: tl.constexpr):
    """A tile of the saved square matrix; it leaves float16's range, and tf32 has its precision."""
    if FORMAT == "fp16":
        return round_to(m, 8193.0)
    else:
        return operand(m, FORMAT)


@triton.jit
def view_operand(centred, FORMAT: tl.constexpr):
    """The forward product's very values, in the format of the gradient's product."""
    if FORMAT == "fp16":
        return value(centred, FORMAT)
    else:
        return operand(centred, FORMAT)


@triton.jit
def narrow(z, like, FORMAT: tl.constexpr):
    """z in the element type of the pointer `like`, rounded to nearest."""
    if FORMAT == "bf16 in fp32":
        z = round_to(z, 65537.0)
    return z.to(like.dtype.element_ty)


@triton.jit
def round_if(value, to, ROUND: tl.constexpr):
    """value in the element type of the pointer `to`, rounded to nearest.

    ROUND: to bfloat16 by hand (Veltkamp), because the interpreter would truncate.
    """
    if ROUND:
        wide = value * 65537.0
        value = tl.where(tl.abs(value) < 1e30, wide - (wide - value), value)
    return value.to(to.dtype.element_ty)
