"""Launchers of the VICRegL ops' Triton kernels; `contract.py` says what each takes and returns.

Launches: a search 2 (the minima of tiles, then their ranks), the pairs 2 forward and 1 backward.
Nothing waits for the device, and allocation depends on shapes alone, so all can be captured in a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from vicreg_kernels.core.triton.device import device_of, on_device, rounds_by_hand
from vicreg_kernels.core.triton.sums import finish_kernel
from vicreg_kernels.core.units import unit as unit_of
from vicreg_kernels.vicregl.contract import MOST_COUNTS
from vicreg_kernels.vicregl.triton.match import match_kernel, rank_kernel
from vicreg_kernels.vicregl.triton.pairs import pairs_gradient_kernel, pairs_kernel

# Positions of a, positions of b and channels of a tile, by the most channels it is for: 64 sums a
# thread of 4 warps, fewer where keys take the registers. Chosen by counting, not measured yet.
_RANK_BLOCK = 64
_GRADIENT_WIDTH = 64  # the other side's positions that a program looks through at once
_TILES = ((8, (16, 32, 4)), (64, (16, 16, 32)), (None, (8, 8, 128)))


def _geometry(a: Tensor, b: Tensor) -> tuple[int, int, list[int]]:
    """(unit, channels in it, strides of a and b in it but for those along the channels)."""
    (*of_a, step_a), (*of_b, step_b) = a.stride(), b.stride()
    unit = unit_of(a, (a.shape[3], *of_a, *of_b), (step_a, step_b))
    strides = [*(s // unit for s in of_a), step_a, *(s // unit for s in of_b), step_b]
    return unit, a.shape[3] // unit, strides


def _tile(dim: int) -> tuple[int, int, int]:
    return next(tile for most, tile in _TILES if most is None or dim <= most)


def _columns(dim: int) -> dict[str, int]:
    """A block of channels, and warps for 8 elements a thread. Fewer than 256 would be kernels of
    their own, and no faster: one warp loads 256 in as many vectors as it does fewer.
    """
    block = max(256, min(triton.next_power_of_2(dim), 1024))
    return {"BLOCK": block, "num_warps": block // 256}


def _rule(z: Tensor, counts: Sequence[int], weights: Sequence[float]) -> tuple[float, ...]:
    """(most, counts, factors) of one direction, as `Kept` in csrc/vicregl/formula.h."""
    size = z.shape[1] * z.shape[3]
    factors = [weight / (size * count) for count, weight in zip(counts, weights, strict=True)]
    left = MOST_COUNTS - len(factors)
    return max(counts, default=0), *counts, *(0,) * left, *factors, *(0.0,) * left


def match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (views_a, batch, rows_a, dim), (views_b, _, rows_b, _) = a.shape, b.shape
    samples = views_a * views_b * batch
    rows, others, channels = _tile(dim)
    tiles = triton.cdiv(rows_a, rows)

    def made(length: int) -> tuple[Tensor, Tensor]:
        shape = (views_a, views_b, batch, length)
        return a.new_empty(shape, dtype=torch.int32), a.new_empty(shape, dtype=torch.int32)

    (nearest_a, rank_a), (nearest_b, rank_b) = made(rows_a), made(rows_b)
    row_keys = a.new_empty((samples, rows_a), dtype=torch.int64)
    column_keys = a.new_empty((samples, tiles, rows_b), dtype=torch.int64)
    blocks_a, blocks_b = triton.cdiv(rows_a, _RANK_BLOCK), triton.cdiv(rows_b, _RANK_BLOCK)
    unit, width, strides = _geometry(a, b)
    with on_device(a):
        match_kernel[(samples * tiles,)](
            a, b, row_keys, column_keys, views_b, batch, rows_a, rows_b, width, tiles,
            *strides, UNIT=unit, A=rows, B=others, C=channels, num_warps=4,
        )  # fmt: skip
        rank_kernel[(samples * (blocks_a + blocks_b),)](
            row_keys, column_keys, nearest_a, rank_a, nearest_b, rank_b, rows_a, rows_b, tiles,
            blocks_a, blocks_b, BLOCK=_RANK_BLOCK, num_warps=4,
        )  # fmt: skip
    return nearest_a, rank_a, nearest_b, rank_b


def pairs_forward(
    a: Tensor,
    b: Tensor,
    nearest_a: Tensor,
    rank_a: Tensor,
    nearest_b: Tensor,
    rank_b: Tensor,
    counts_a: Sequence[int],
    weights_a: Sequence[float],
    counts_b: Sequence[int],
    weights_b: Sequence[float],
) -> Tensor:
    (views_a, batch, rows_a, dim), (views_b, _, rows_b, _) = a.shape, b.shape
    samples = views_a * views_b * batch
    processors = device_of(a).processors
    programs = min(samples * max(rows_a, rows_b), 16 * processors)
    partials = a.new_empty(programs, dtype=torch.float64)
    result = a.new_empty((), dtype=torch.float32)
    unit, channels, strides = _geometry(a, b)
    with on_device(a):
        pairs_kernel[(programs,)](
            a, b, nearest_a, rank_a, nearest_b, rank_b, partials,
            samples, batch, views_b, rows_a, rows_b, channels, *strides,
            *_rule(a, counts_a, weights_a), *_rule(b, counts_b, weights_b),
            UNIT=unit, **_columns(dim),
        )  # fmt: skip
        finish_kernel[(1,)](partials, result, programs, 1.0, BLOCK=1024, num_warps=4)
    return result


def pairs_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    nearest_a: Tensor,
    rank_a: Tensor,
    nearest_b: Tensor,
    rank_b: Tensor,
    need_a: bool,
    need_b: bool,
    counts_a: Sequence[int],
    weights_a: Sequence[float],
    counts_b: Sequence[int],
    weights_b: Sequence[float],
) -> tuple[Tensor, Tensor]:
    (views_a, batch, rows_a, dim), (views_b, _, rows_b, _) = a.shape, b.shape
    out_a, out_b = a.new_empty(a.shape if need_a else 0), b.new_empty(b.shape if need_b else 0)
    count_a = views_a * batch * rows_a if need_a else 0
    count_b = views_b * batch * rows_b if need_b else 0
    if count_a + count_b == 0:
        return out_a, out_b
    columns = _columns(dim)
    blocks = triton.cdiv(dim, columns["BLOCK"])
    unit, channels, strides = _geometry(a, b)
    # Left to itself, Triton 3.6's ptxas takes 56 registers for sm_90 and spills one value.
    with on_device(a):
        pairs_gradient_kernel[((count_a + count_b) * blocks,)](
            grad, a, b, nearest_a, rank_a, nearest_b, rank_b, out_a, out_b,
            count_a, blocks, batch, views_a, views_b, rows_a, rows_b, channels, *strides,
            *_rule(a, counts_a, weights_a), *_rule(b, counts_b, weights_b),
            ROUND=rounds_by_hand(a),
            WIDTH=_GRADIENT_WIDTH, UNIT=unit, maxnreg=72 if unit > 1 else 160, **columns,
        )  # fmt: skip
    return out_a, out_b
