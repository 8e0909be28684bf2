"""The fused backends of the tokens ops behind one set of functions.

P, K, R: index is [P, K], where sample p of P is sample p % B of a batch of B, or packed [R] with
offsets [B + 1], int64. Indices are int32 or int64 and contiguous; other tensors have any strides.

    gather(x [B, T, D], index, offsets) -> rows [P, K, D] or [R, D]
    scatter(rows, index, offsets, batch, length, fill, accumulate, reduce) -> [B, length, D], or
        [length, D], summed over samples, where `reduce`; `accumulate` adds rows of the same token
        in ascending order
    loss_forward(pred [P, K, D] or [R, D], teacher [B, T, D], index, offsets, kind, normalize, beta,
        eps) -> loss float32 [], saved float32 [R, 2 or 4] (mean and rstd of each teacher row; for
        the cosine the two factors of its gradient)
    loss_backward(grad, pred, teacher, index, offsets, saved, kind, normalize, beta) -> grad of pred
    order(context_index, target_index, context_offsets, target_offsets) -> index, context_rows,
        target_rows
    assemble(context [C, Kc, D], context_index [C, Kc], context_rows [P, Kc], target float32 [D] or
        [P, Kt, D], target_index [P, Kt], target_rows [P, Kt], positions float32 [T, D]) ->
        [P, Kc + Kt, D]
    column_sum(sequence [P, S, D], rows [P, K]) -> float32 [D]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vicreg_kernels.core import loader, registry

registry.register("tokens", tokens=registry.ANY_SIZE)

# As in csrc/tokens/formula.h.
KINDS = ("smooth_l1", "l1", "mse", "cosine")


def saved_floats(kind: int) -> int:
    return 4 if KINDS[kind] == "cosine" else 2


class Settings(NamedTuple):
    """What a prediction loss computes, as the ops take it. kind: its place in KINDS."""

    kind: int
    normalize: bool
    beta: float
    eps: float


@dataclass(frozen=True)
class Kernels(loader.Functions):
    gather: Callable[..., Any]
    scatter: Callable[..., Any]
    loss_forward: Callable[..., Any]
    loss_backward: Callable[..., Any]
    order: Callable[..., Any]
    assemble: Callable[..., Any]
    column_sum: Callable[..., Any]
