"""Sums of partial results in float64, in a fixed order."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def total(values, count, BLOCK: tl.constexpr):
    """The sum of float64 partial sums, in a fixed order."""
    acc = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        acc += tl.load(values + at, mask=at < count, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["count"])
def finish_kernel(partials, loss, count, scale, BLOCK: tl.constexpr):
    """The sum of the partials, times scale."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partials + at, mask=at < count, other=0.0)
    tl.store(loss, (tl.sum(total, axis=0) * scale).to(tl.float32))
