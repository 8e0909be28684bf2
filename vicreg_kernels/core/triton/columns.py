"""Device code on columns: running moments, the two parts of a mean, tiles of a triangle."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def welford(z, pivot, keep, count, mean, scatter):
    """One more row in each slot; mean is that of z - pivot. count: [ROWS, 1], this row included."""
    deviation = z - pivot
    delta = tl.where(keep, deviation - mean, 0.0)
    mean += delta / count
    scatter += tl.where(keep, delta * (deviation - mean), 0.0)
    return mean, scatter


@triton.jit
def merge(count, mean, scatter, total):
    """Rows of (count, mean, scatter) as one: [ROWS, 1], [ROWS, C], [ROWS, C] -> [C], [C]."""
    whole = tl.sum(count * mean, axis=0) / total
    shift = mean - whole[None, :]
    return whole, tl.sum(scatter + count * shift * shift, axis=0)


@triton.jit
def load_mean(moments, dim, columns, mask):
    """The two parts of the columns' mean; moments: [3, dim] of one plane."""
    origin = tl.load(moments + columns, mask=mask, other=0.0)
    return origin, tl.load(moments + dim + columns, mask=mask, other=0.0)


@triton.jit
def triangle(t):
    """Tile t of the upper triangle, column by column: (i, j) with i <= j."""
    j = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > t, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= t, j + 1, j)
    return t - j * (j + 1) // 2, j
