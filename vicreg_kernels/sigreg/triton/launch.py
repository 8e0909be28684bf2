"""Launchers of the SIGReg op's Triton kernels: the functions of contract.py.

Launches: directions 1; forward 2; gradient 2; across ranks sums 2 (1 where one block holds all
rows) and statistic 2. Nothing waits for the device, allocation depends on shapes alone, and a step
that is a tensor is read on the device, so all of it can be captured in a CUDA graph. Knots and
weights are arguments of the kernels, by value. GPU times: not measured yet.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from vicreg_kernels.core.triton.device import device_of, on_device, operand_format
from vicreg_kernels.core.units import unit as unit_of
from vicreg_kernels.sigreg.triton.kernels import (
    directions_kernel,
    finish_kernel,
    product_kernel,
    statistic_kernel,
    waves_kernel,
)
from vicreg_kernels.sigreg.triton.sums import sums_kernel

# Pairs of knots whose four sums a lane keeps in registers; as in kernels.py.
MOST_PAIRS = 8
MOST_CHUNKS = 4

# Launch configurations, chosen by counting: the first whose programs fill the GPU, else the last.
# Tiles are (rows, columns, depth, warps, stages), of eight warps: four spill on sm_100. In float32
# the larger tile of the sums takes 161 registers, which leaves a multiprocessor one program, too
# few warps to hide the column sums' loads: there the smaller one, with 117, is the only one.
SUMS = ((128, 64, 32, 8, 3), (64, 64, 32, 8, 3))
PRODUCT = ((128, 64, 32, 8, 3), (64, 64, 32, 8, 3))
WAVES = (32, 64, 8)  # rows, columns, warps
STATISTIC = (8, 128, 4)  # row blocks at once, columns, warps
DIRECTIONS = (32, 8, 8)  # groups of four rows, columns, warps
FINISH = (256, 4)  # elements, warps


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
    """What the kernels need of the knots.

    pairs: 0 where they are not t_k = start + k spacing with start = spacing or spacing / 2. half:
    start = spacing / 2. turns: of start, then of the centre of each chunk of 2 pairs knots, between
    two of them with half, else the knot of number `pairs`; without pairs, of every knot; each as
    `_quarter_turns`, with zeros behind.
    """

    turns: tuple[float, ...]
    half: bool = False
    pairs: int = 0
    chunks: int = 0


@lru_cache(maxsize=64)
def _knots(knots: tuple[float, ...]) -> Knots:
    """The rule of formula.h's spacing_of."""
    count, first = len(knots), knots[0]
    step = (knots[-1] - first) / (count - 1) if count > 1 else first
    slack = 1e-7 * knots[-1]
    equal = all(abs(t - (first + k * step)) <= slack for k, t in enumerate(knots))
    half = abs(first - 0.5 * step) <= slack
    if not equal or not (half or abs(first - step) <= slack):
        return Knots(_turns(knots, MOST_CHUNKS * 2 * MOST_PAIRS))
    chunks = triton.cdiv(count, 2 * MOST_PAIRS)
    pairs = triton.cdiv(count, 2 * chunks)
    on = pairs - (0.5 if half else 1.0)
    centres = [first + (2 * c * pairs + on) * step for c in range(chunks)]
    return Knots(_turns((first, *centres), 1 + MOST_CHUNKS), half, pairs, chunks)


def _turns(positions: Sequence[float], length: int) -> tuple[float, ...]:
    both = [part for t in positions for part in _quarter_turns(t)]
    return *both, *(0.0,) * (2 * length - len(both))


@lru_cache(maxsize=64)
def _rule(knots: tuple[float, ...], weights: tuple[float, ...]) -> tuple[float, ...]:
    """Knots, weights and exp(-t^2 / 2), each with zeros behind: 16 of each, or 64."""
    targets = tuple(math.exp(-0.5 * t * t) for t in knots)
    behind = ((16 if len(knots) <= 16 else 64) - len(knots)) * (0.0,)
    return *knots, *behind, *weights, *behind, *targets, *behind


def _tile(
    choices: Sequence[tuple[int, ...]], z: Tensor, groups: int, rows: int, columns: int
) -> tuple[int, ...]:
    processors = device_of(z).processors
    for height, width, *rest in choices:
        if groups * triton.cdiv(rows, height) * triton.cdiv(columns, width) >= processors:
            return height, width, *rest
    return choices[-1]


def directions(
    like: Tensor,
    step: Tensor | None,
    number: int,
    seed: int,
    dim: int,
    slices: int,
) -> Tensor:
    """Random unit directions [dim, slices]; the reference's, within a few roundings."""
    out = torch.empty(dim, slices, dtype=like.dtype, device=like.device)
    height, width, warps = DIRECTIONS
    with on_device(like):
        directions_kernel[(triton.cdiv(slices, width),)](
            step, out, number if step is None else 0, seed, dim, slices,
            FORMAT=operand_format(out)[0], GROUPS=height, COLUMNS=width, num_warps=warps,
        )  # fmt: skip
    return out


def _sums(z: Tensor, directions: Tensor, knots: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """(partial sums [row blocks, G, 2, K, M], projections, a counter at 0)."""
    groups, rows, dim = z.shape
    slices, count = directions.shape[1], len(knots)
    k = _knots(tuple(knots))
    format, precision, _ = operand_format(z)
    choices = SUMS[-1:] if z.dtype == torch.float32 else SUMS
    height, width, depth, warps, stages = _tile(choices, z, groups, rows, slices)
    row_blocks = triton.cdiv(rows, height)
    projections = torch.empty(groups, rows, slices, device=z.device)
    parts = torch.empty(row_blocks, groups, 2, count, slices, device=z.device)
    done = torch.empty(1, dtype=torch.int32, device=z.device)
    (s_g, s_n, s_d), (a_d, a_m) = z.stride(), directions.stride()
    unit = unit_of(z, (dim, slices, s_g, s_n, a_d), (s_d, a_m))
    # Left to itself, Triton 3.6's ptxas takes 64 there for sm_80 and spills a value.
    registers = {} if k.pairs or z.dtype == torch.float32 else {"maxnreg": 128}
    with on_device(z):
        sums_kernel[(groups * row_blocks * triton.cdiv(slices, width),)](
            z, directions, projections, parts, done,
            groups, rows, dim // unit, slices // unit, row_blocks, count, k.chunks,
            s_g // unit, s_n // unit, s_d, a_d // unit, a_m, k.turns,
            PAIRS=k.pairs, HALF=k.half, MANY=k.chunks > 1, UNIT=unit,
            FORMAT=format, PRECISION=precision,
            ROWS=height, COLUMNS=width, DEPTH=depth, WIDE=32 * warps // width,
            num_warps=warps, num_stages=stages, **registers,
        )  # fmt: skip
    return parts, projections, done


def sums(z: Tensor, directions: Tensor, knots: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Float32 (sums of cos(t p) and sin(t p) over rows [G, 2, K, M], projections p [G, N, M])."""
    parts, projections, _ = _sums(z, directions, knots)
    if parts.shape[0] == 1:
        return parts[0], projections
    out = torch.empty(parts.shape[1:], device=z.device)
    block, warps = FINISH
    with on_device(z):
        finish_kernel[(triton.cdiv(out.numel(), block),)](
            parts, out, parts.shape[0], out.numel(), BLOCK=block, num_warps=warps
        )
    return out, projections


def _statistic(
    parts: Tensor,
    done: Tensor,
    knots: Sequence[float],
    weights: Sequence[float],
    count: float,
    factor: float,
    ranks: float,
) -> tuple[Tensor, Tensor]:
    row_blocks, groups, _, number, slices = parts.shape
    high, width, warps = STATISTIC
    programs = groups * number * triton.cdiv(slices, width)
    loss = torch.empty((), device=parts.device)
    coefficients = torch.empty(parts.shape[1:], device=parts.device)
    shares = torch.empty(programs, dtype=torch.float64, device=parts.device)
    scale = factor / (groups * slices)
    rule, unit = _rule(tuple(knots), tuple(weights)), unit_of(parts, (slices,))
    with on_device(parts):
        statistic_kernel[(programs,)](
            parts, done, shares, loss, coefficients,
            groups, row_blocks, slices // unit, number,
            float(count), scale, 2.0 * ranks * scale / count, rule,
            MOST=len(rule) // 3, UNIT=unit, HIGH=high, COLUMNS=width, BLOCK=1024, num_warps=warps,
        )  # fmt: skip
    return loss, coefficients


def statistic(
    sums: Tensor,
    knots: Sequence[float],
    weights: Sequence[float],
    count: float,
    factor: float,
    ranks: float,
) -> tuple[Tensor, Tensor]:
    """Float32 (loss, 0-d, coefficients [G, 2, K, M] of its gradient by p, times ranks)."""
    done = torch.zeros(1, dtype=torch.int32, device=sums.device)
    return _statistic(sums[None], done, knots, weights, count, factor, ranks)


def forward(
    z: Tensor,
    directions: Tensor,
    knots: Sequence[float],
    weights: Sequence[float],
    count: float,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, coefficients, projections) of sums() and statistic() for one rank."""
    parts, projections, done = _sums(z, directions, knots)
    return *_statistic(parts, done, knots, weights, count, factor, 1.0), projections


def gradient(
    grad: Tensor,
    coefficients: Tensor,
    projections: Tensor,
    directions: Tensor,
    knots: Sequence[float],
) -> Tensor:
    """The gradient of z, [G, N, D] in directions' dtype. grad: float32 of one element."""
    groups, rows, slices = projections.shape
    dim, (a_d, a_m) = directions.shape[0], directions.stride()
    k = _knots(tuple(knots))
    format, _, precision = operand_format(directions)
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
    with on_device(projections):
        row_blocks, unit = triton.cdiv(rows, height), unit_of(waves, (slices,))
        waves_kernel[(groups * row_blocks * triton.cdiv(slices, width),)](
            grad, coefficients, projections, waves,
            rows, slices // unit, row_blocks, len(knots), k.turns,
            EQUAL=k.pairs > 0, HALF=k.half, UNIT=unit, FORMAT=format,
            ROWS=height, COLUMNS=width, num_warps=warps,
        )  # fmt: skip
        row_blocks = triton.cdiv(rows, tile_rows)
        unit = unit_of(directions, (dim, slices, a_d), (a_m,))
        product_kernel[(groups * row_blocks * triton.cdiv(dim, tile_columns),)](
            waves, directions, out,
            rows, dim // unit, slices // unit, row_blocks, a_d // unit, a_m,
            UNIT=unit, FORMAT=format, PRECISION=precision,
            ROWS=tile_rows, COLUMNS=tile_columns, DEPTH=depth,
            num_warps=product_warps, num_stages=stages,
        )  # fmt: skip
    return out
