"""Launchers of the SIGReg op's Triton kernels: the four functions of backends.py.

Launches: directions 1; sums 2 (1 where one block holds all rows); statistic 1 up to 1024 slices of
all groups together, else 2; gradient 2. Nothing waits for the device, allocation depends on shapes
alone, and the step is read on the device, so all of it can be captured in a CUDA graph. Knots and
weights are constants of the kernels: others are compiled once each. GPU times: not measured yet.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from vicreg_kernels.sigreg.triton_kernels import (
    directions_kernel,
    finish_kernel,
    loss_kernel,
    product_kernel,
    statistic_kernel,
    sums_kernel,
    waves_kernel,
)

# What the interpreter, which has no multiprocessors, is launched for.
_INTERPRETED_PROCESSORS = 4
# Pairs of knots whose four sums a lane keeps in registers.
MOST_PAIRS = 8

# Launch configurations, chosen by counting: the first whose programs fill the GPU, else the last.
# Tiles are (rows, columns, depth, warps, stages), of eight warps: four spill on sm_100. In float32
# the larger tile of the sums takes 161 registers, which leaves a multiprocessor one program, too
# few warps to hide the column sums' loads: there the smaller one, with 117, is the only one.
SUMS = ((128, 64, 32, 8, 3), (64, 64, 32, 8, 3))
PRODUCT = ((128, 64, 32, 8, 3), (64, 64, 32, 8, 3))
WAVES = (32, 64, 8)  # rows, columns, warps
STATISTIC = (1024, 8)  # columns, warps
DIRECTIONS = (32, 8, 8)  # groups of four rows, columns, warps
FINISH = (256, 4)  # elements, warps


@cache
def _device(index: int | None) -> tuple[int, int]:
    """(multiprocessors, compute capability's major number)."""
    if index is None:
        return _INTERPRETED_PROCESSORS, 9
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.major


def _properties(z: Tensor) -> tuple[int, int]:
    return _device(z.device.index if z.is_cuda else None)


def _on_device(z: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(z.device) if z.is_cuda else nullcontext()


def _format(z: Tensor) -> tuple[str, str, str]:
    """(operand format, precision of the forward product, of the backward product).

    float32 is multiplied as three tf32 products, which keep about 21 bits, unless the user allows
    tf32 through torch.set_float32_matmul_precision.
    """
    capability = _properties(z)[1]
    if z.dtype == torch.bfloat16:  # Triton's interpreter has no right bfloat16 product
        return ("bf16 in fp32" if z.device.type == "cpu" else "bf16"), "ieee", "ieee"
    if z.dtype == torch.float16:  # the waves leave float16's range: tf32 has its precision
        return "fp16", "ieee", "tf32" if capability >= 8 else "ieee"
    if capability < 8:
        return "fp32", "ieee", "ieee"
    if torch.get_float32_matmul_precision() == "highest":
        return "fp32", "tf32x3", "tf32x3"
    return "tf32", "tf32", "tf32"


def _two_floats(turns: float) -> tuple[float, float]:
    def single(x: float) -> float:
        return struct.unpack("f", struct.pack("f", x))[0]

    high = single(turns)
    return high, single(turns - high)


def _quarter_turns(t: float) -> tuple[float, float]:
    """t as what multiplies p to give quarter turns, the sum of two floats."""
    return _two_floats(t * 2.0 / math.pi)


@dataclass(frozen=True)
class Knots:
    """What the kernels are compiled for.

    singles: every knot, where they are not t_k = start + k spacing with start = spacing or
    spacing / 2, else empty. half: start = spacing / 2. centres: of each chunk of 2 pairs knots,
    between two of them with half, else the knot of number `pairs`. All but half and pairs as
    `_quarter_turns`.
    """

    singles: tuple[tuple[float, float], ...]
    half: bool = False
    start: tuple[float, float] = (0.0, 0.0)
    pairs: int = 0
    centres: tuple[tuple[float, float], ...] = ()


@cache
def _knots(knots: tuple[float, ...]) -> Knots:
    """The rule of formula.h's spacing_of."""
    count, first = len(knots), knots[0]
    step = (knots[-1] - first) / (count - 1) if count > 1 else first
    slack = 1e-7 * knots[-1]
    equal = all(abs(t - (first + k * step)) <= slack for k, t in enumerate(knots))
    half = abs(first - 0.5 * step) <= slack
    if not equal or not (half or abs(first - step) <= slack):
        return Knots(tuple(_quarter_turns(t) for t in knots))
    chunks = triton.cdiv(count, 2 * MOST_PAIRS)
    pairs = triton.cdiv(count, 2 * chunks)
    on = pairs - (0.5 if half else 1.0)
    centres = [first + (2 * c * pairs + on) * step for c in range(chunks)]
    return Knots(
        singles=(),
        half=half,
        start=_quarter_turns(first),
        pairs=pairs,
        centres=tuple(_quarter_turns(t) for t in centres),
    )


def _tile(
    choices: Sequence[tuple[int, ...]], z: Tensor, groups: int, rows: int, columns: int
) -> tuple[int, ...]:
    processors = _properties(z)[0]
    for height, width, *rest in choices:
        if groups * triton.cdiv(rows, height) * triton.cdiv(columns, width) >= processors:
            return height, width, *rest
    return choices[-1]


def directions(step: Tensor, seed: int, dim: int, slices: int) -> Tensor:
    """Random unit directions, float32 [dim, slices]; the reference's, within a few roundings."""
    out = torch.empty(dim, slices, device=step.device)
    height, width, warps = DIRECTIONS
    seed &= (1 << 64) - 1
    with _on_device(step):
        directions_kernel[(triton.cdiv(slices, width),)](
            step, out, seed - (1 << 64) if seed >> 63 else seed, dim, slices,
            triton.cdiv(dim, 4), GROUPS=height, COLUMNS=width, num_warps=warps,
        )  # fmt: skip
    return out


def sums(z: Tensor, directions: Tensor, knots: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Float32 (sums of cos(t p) and sin(t p) over rows [G, 2, K, M], projections p [G, N, M])."""
    groups, rows, dim = z.shape
    slices, count = directions.shape[1], len(knots)
    k = _knots(tuple(knots))
    format, precision, _ = _format(z)
    choices = SUMS[-1:] if z.dtype == torch.float32 else SUMS
    height, width, depth, warps, stages = _tile(choices, z, groups, rows, slices)
    row_blocks = triton.cdiv(rows, height)
    projections = torch.empty(groups, rows, slices, device=z.device)
    out = torch.empty(groups, 2, count, slices, device=z.device)
    parts = out if row_blocks == 1 else torch.empty(row_blocks, *out.shape, device=z.device)
    with _on_device(z):
        sums_kernel[(groups * row_blocks * triton.cdiv(slices, width),)](
            z, directions, projections, parts,
            groups, rows, dim, slices, row_blocks, *z.stride(), *directions.stride(),
            COUNT=count, KNOTS=k.singles, PAIRS=k.pairs, CHUNKS=len(k.centres), HALF=k.half,
            START=k.start, CENTRES=k.centres, FORMAT=format, PRECISION=precision,
            ROWS=height, COLUMNS=width, DEPTH=depth, WIDE=32 * warps // width,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if row_blocks > 1:
            block, warps = FINISH
            finish_kernel[(triton.cdiv(out.numel(), block),)](
                parts, out, row_blocks, out.numel(), BLOCK=block, num_warps=warps
            )
    return out, projections


def statistic(
    sums: Tensor,
    knots: Sequence[float],
    weights: Sequence[float],
    count: float,
    factor: float,
    ranks: float,
) -> tuple[Tensor, Tensor]:
    """Float32 (loss [1], coefficients [G, 2, K, M] of its gradient by p, times ranks)."""
    groups, _, number, slices = sums.shape
    loss = torch.empty(1, device=sums.device)
    coefficients = torch.empty_like(sums)
    width, warps = STATISTIC
    width = min(width, triton.next_power_of_2(slices))
    programs = groups * triton.cdiv(slices, width)
    partials = torch.empty(programs if programs > 1 else 0, dtype=torch.float64, device=sums.device)
    scale = factor / (groups * slices)
    with _on_device(sums):
        statistic_kernel[(programs,)](
            sums, loss, partials, coefficients,
            slices, float(count), scale, 2.0 * ranks * scale / count,
            COUNT=number, KNOTS=tuple(knots), WEIGHTS=tuple(weights),
            TARGETS=tuple(math.exp(-0.5 * t * t) for t in knots),
            ALONE=programs == 1, COLUMNS=width, num_warps=warps,
        )  # fmt: skip
        if programs > 1:
            loss_kernel[(1,)](partials, loss, programs, scale, BLOCK=1024, num_warps=4)
    return loss, coefficients


def gradient(
    grad: Tensor,
    coefficients: Tensor,
    projections: Tensor,
    directions: Tensor,
    knots: Sequence[float],
) -> Tensor:
    """The gradient of z, [G, N, D] in directions' dtype. grad: float32 [1]."""
    groups, rows, slices = projections.shape
    dim, count = directions.shape[0], len(knots)
    k = _knots(tuple(knots))
    format, _, precision = _format(directions)
    half_waves = directions.dtype == torch.bfloat16
    waves = torch.empty(
        projections.shape, dtype=torch.bfloat16 if half_waves else torch.float32,
        device=projections.device,
    )  # fmt: skip
    out = torch.empty(groups, rows, dim, dtype=directions.dtype, device=projections.device)
    height, width, warps = WAVES
    tile_rows, tile_columns, depth, product_warps, stages = _tile(
        PRODUCT, projections, groups, rows, dim
    )
    with _on_device(projections):
        row_blocks = triton.cdiv(rows, height)
        waves_kernel[(groups * row_blocks * triton.cdiv(slices, width),)](
            grad, coefficients, projections, waves, rows, slices, row_blocks,
            COUNT=count, KNOTS=k.singles, UNIFORM=not k.singles, HALF=k.half, START=k.start,
            FORMAT=format, ROWS=height, COLUMNS=width, num_warps=warps,
        )  # fmt: skip
        row_blocks = triton.cdiv(rows, tile_rows)
        product_kernel[(groups * row_blocks * triton.cdiv(dim, tile_columns),)](
            waves, directions, out, rows, dim, slices, row_blocks, *directions.stride(),
            FORMAT=format, PRECISION=precision, ROWS=tile_rows, COLUMNS=tile_columns, DEPTH=depth,
            num_warps=product_warps, num_stages=stages,
        )  # fmt: skip
    return out
