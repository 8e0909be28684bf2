"""The fused backends of the VICRegL ops behind one set of functions.

U, V: the views on either side; every view of `a` is paired with every view of `b`. a [U, B, L1, C]
and b [V, B, L2, C] have any strides and one dtype, float32, bfloat16 or float16; everything is
computed in float32.

    match(a, b) -> nearest_a [U, V, B, L1], rank_a [U, V, B, L1], nearest_b [U, V, B, L2],
        rank_b [U, V, B, L2], int32: for every position of a (then of b) the position of the other
        map at the least Euclidean distance, and the rank of that distance among the sample's own,
        0 the closest. Ties go to the lower index in both; a distance that is not a number counts
        as +inf. Squared distances are sums of squared differences, not |a|^2 + |b|^2 - 2 a.b.
    pairs_forward(a, b, nearest_a, rank_a, nearest_b, rank_b, counts_a, weights_a, counts_b,
        weights_b) -> float32 []: summed over all U V pairs of views, over both directions and over
        t, weights[t] times the mean over the batch, the counts[t] matches of least rank, and C of
        the squared difference of a position and its nearest one.
    pairs_backward(grad float32 [], a, b, nearest_a, rank_a, nearest_b, rank_b, need_a, need_b,
        counts_a, weights_a, counts_b, weights_b) -> gradients of a and b, contiguous, in their
        dtype, [0] where not needed; a position that several others match adds them in a fixed
        order.

counts and weights of a direction have the same length, 0 (it is left out) to MOST_COUNTS;
1 <= counts_a[t] <= L1, 1 <= counts_b[t] <= L2. The integer tensors are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vicreg_kernels.core import loader, registry

registry.register("vicregl", vicregl=registry.ANY_SIZE)

# As kMostCounts in csrc/vicregl/formula.h.
MOST_COUNTS = 4


@dataclass(frozen=True)
class Kernels(loader.Functions):
    match: Callable[..., Any]
    pairs_forward: Callable[..., Any]
    pairs_backward: Callable[..., Any]
