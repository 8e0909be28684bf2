"""Strides that kernels take in UNITs (vicreg_kernels/core/units.py), as elements again."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def across(stride, UNIT: tl.constexpr):
    """A stride given in UNITs, in elements."""
    return tl.cast(stride, tl.int64) * UNIT


@triton.jit
def along(stride, UNIT: tl.constexpr):
    """The stride of columns, which lie side by side where the UNIT is not 1."""
    if UNIT > 1:
        return 1
    else:
        return stride


@triton.jit
def row_at(base, offset, UNIT: tl.constexpr):
    """base + offset, where a row begins: at a multiple of 16 bytes where the UNIT is not 1. So
    kernels need not specialise on the address of base. offset: one number, since Triton mislays
    what it is told of a tensor of pointers.
    """
    at = base + offset
    if UNIT > 1:
        at = tl.multiple_of(at, 16)
    return at
