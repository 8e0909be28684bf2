"""Launchers of the VICReg op's Triton kernels.

Launches: forward 4 on the Gram side and for few rows (statistics, product, strips, terms; one less
where the D x D product needs no split), 5 where rows are many enough to split the statistics;
backward 1. Nothing waits for the device, and allocation depends on shapes alone, so both can be
captured in a CUDA graph. With N < D a view's rows are read twice forward and once backward from
memory, where the triangle's tiles share them through L2. GPU times: not measured yet.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from vicreg_kernels.vicreg import backends, configs
from vicreg_kernels.vicreg.triton_products import (
    gradient_kernel,
    product_kernel,
    strips_kernel,
    terms_kernel,
)
from vicreg_kernels.vicreg.triton_statistics import merge_kernel, statistics_kernel

# What the interpreter, which has no multiprocessors, is launched for.
_INTERPRETED_PROCESSORS = 4


@cache
def _device(index: int | None) -> tuple[str, int, int]:
    """(name, multiprocessors, compute capability's major number)."""
    if index is None:
        return "default", _INTERPRETED_PROCESSORS, 9
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count, properties.major


def operand_format(dtype: torch.dtype, capability: int) -> tuple[str, str, str]:
    """(operand format, precision of the forward product, of the backward product).

    float32 is multiplied as three tf32 products, which keep about 21 bits, unless the user allows
    tf32 through torch.set_float32_matmul_precision.
    """
    if dtype == torch.bfloat16:
        return "bf16", "ieee", "ieee"
    if dtype == torch.float16:  # the square matrix leaves float16's range: tf32 has its precision
        return ("fp16", "ieee", "tf32") if capability >= 8 else ("fp16", "ieee", "ieee")
    if capability < 8:
        return "fp32", "ieee", "ieee"
    if torch.get_float32_matmul_precision() == "highest":
        return "fp32", "tf32x3", "tf32x3"
    return "tf32", "tf32", "tf32"


class _Problem:
    """What a launch needs to know of its inputs."""

    def __init__(self, x: Tensor, y: Tensor | None, unbiased: bool) -> None:
        self.x, self.y = x, x if y is None else y
        self.views = 1 if y is None else 2
        self.groups, self.rows, self.dim = x.shape
        self.planes = self.views * self.groups
        self.gram = self.rows < self.dim
        self.side, self.length = min(self.rows, self.dim), max(self.rows, self.dim)
        self.taken = min(backends.DEFLATED_COLUMNS, self.dim)
        self.degrees = float(self.rows - (1 if unbiased else 0))
        on_gpu = x.device.type == "cuda"
        name, self.processors, capability = _device(x.device.index if on_gpu else None)
        self.format, self.forward_precision, self.backward_precision = operand_format(
            x.dtype, capability
        )
        if self.format == "bf16" and x.device.type == "cpu":
            self.format = "bf16 in fp32"  # see triton_operands.py
        self.config = configs.nearest(name, self.format, self.rows, self.dim)
        self.strides = (*x.stride(), *self.y.stride())

    def on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.x.device) if self.x.is_cuda else nullcontext()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)


def _row_blocks(p: _Problem, blocks: int) -> tuple[int, int]:
    """(row blocks, rows in each) of the statistics: one while columns fill the GPU or rows are few,
    and for rounded operands on the Gram side, whose scatter takes a second look at the rows.
    """
    step, limit = p.config.statistics[0], p.config.block_rows
    if p.rows <= limit or (p.gram and p.format != "fp32"):
        return 1, p.rows
    wanted = min(triton.cdiv(2 * p.processors, p.groups * blocks), triton.cdiv(p.rows, limit))
    height = step * triton.cdiv(triton.cdiv(p.rows, wanted), step)
    return triton.cdiv(p.rows, height), height


def _splits(p: _Problem, tiles: int) -> tuple[int, int]:
    """(splits, length of each) of the product's reduction: enough to fill the GPU, few enough that
    the parts take no more memory than the inputs.
    """
    depth = p.config.product[1]
    wanted = p.config.occupancy * p.processors // (tiles * p.planes)
    steps = triton.cdiv(p.length, depth)
    splits = max(1, min(wanted, p.length // p.side, steps))
    chunk = depth * triton.cdiv(steps, splits)
    return triton.cdiv(p.length, chunk), chunk


def forward(
    x: Tensor,
    y: Tensor | None,
    margin: float,
    eps: float,
    unbiased: bool,
    scales: list[float],
    weights: list[float],
) -> tuple[Tensor, ...]:
    """The six tensors of op.py for x, y: [G, N, D]."""
    p = _Problem(x, y, unbiased)
    saved = backends.empty_saved(x, p.views, "triton")
    terms, moments, squares, deflated, index, _ = saved
    height, width, warps = p.config.statistics
    blocks = triton.cdiv(p.dim, width)
    row_blocks, block_rows = _row_blocks(p, blocks)
    tile, depth, product_warps, stages = p.config.product
    across = triton.cdiv(p.side, tile)
    tiles = across * (across + 1) // 2
    splits, chunk = _splits(p, tiles)
    whole = not p.gram and splits == 1
    strip, strip_width, strip_warps = p.config.strips
    strips = triton.cdiv(p.side, strip)

    partial_rows = 0 if row_blocks == 1 else p.planes * row_blocks
    partials = p.empty(partial_rows, 2, p.dim)
    counts = (
        p.groups * row_blocks * blocks if p.views == 2 else 0,
        p.planes * blocks,
        p.planes * (tiles if whole else strips),
    )
    differences, hinges, sums, diagonal = p.empty(
        sum(counts) + p.planes, dtype=torch.float64
    ).split((*counts, p.planes))
    candidates = p.empty(p.planes if p.gram else 0, blocks, 5)
    candidate_index = p.empty(p.planes if p.gram else 0, blocks, 4, dtype=torch.int32)
    taken = p.empty(p.planes if p.gram else 0, 4, p.rows)
    parts = squares if splits == 1 else p.empty(p.planes, splits, p.side, p.side)

    with p.on_device():
        statistics_kernel[(p.groups * row_blocks * blocks,)](
            p.x, p.y, moments, partials, hinges, differences, candidates, candidate_index,
            p.groups, p.rows, p.dim, row_blocks, block_rows, *p.strides, p.degrees, margin, eps,
            VIEWS=p.views, GRAM=p.gram, FINAL=row_blocks == 1, FORMAT=p.format,
            ROWS=height, COLUMNS=width, num_warps=warps,
        )  # fmt: skip
        if row_blocks > 1:
            merge_kernel[(p.planes * blocks,)](
                p.x, p.y, moments, partials, hinges, candidates, candidate_index,
                p.groups, p.rows, p.dim, row_blocks, block_rows,
                x.stride(0), x.stride(2), p.y.stride(0), p.y.stride(2), p.degrees, margin, eps,
                GRAM=p.gram, ROWS=height, COLUMNS=width, num_warps=warps,
            )  # fmt: skip
        product_kernel[(p.planes * splits * tiles,)](
            p.x, p.y, moments, parts, sums, candidates, candidate_index, index, taken, diagonal,
            p.groups, p.rows, p.dim, blocks, splits, chunk, *p.strides, p.degrees,
            GRAM=p.gram, WHOLE=whole, FORMAT=p.format, PRECISION=p.forward_precision,
            TAKEN=p.taken, WIDTH=triton.next_power_of_2(4 * blocks),
            TILE=tile, DEPTH=depth, num_warps=product_warps, num_stages=stages,
        )  # fmt: skip
        if not whole:
            strips_kernel[(p.planes * strips,)](
                parts, squares, sums, taken, deflated, diagonal, p.side, splits, p.degrees,
                GRAM=p.gram, TAKEN=p.taken, STRIP=strip, WIDTH=strip_width, num_warps=strip_warps,
            )  # fmt: skip
        terms_kernel[(1,)](
            terms, differences, hinges, sums, *counts,
            scales[0] / x.numel(), scales[1] / (p.groups * p.dim), scales[2] / p.groups, *weights,
            BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return saved


def backward(
    grads: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    squares: Tensor,
    deflated: Tensor,
    index: Tensor,
    centred: Tensor,
    need_x: bool,
    need_y: bool,
    margin: float,
    eps: float,
    unbiased: bool,
    scales: list[float],
    weights: list[float],
) -> tuple[Tensor, Tensor]:
    """The gradients of x and y, contiguous, empty where not needed. grads: float32 [1] or [4]."""
    p = _Problem(x, y, unbiased)
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_y = x.new_empty(x.shape if need_y else (0,))
    height, width, depth, warps, stages = p.config.gradient
    tiles = triton.cdiv(p.rows, height) * triton.cdiv(p.dim, width)
    planes = p.groups * (need_x + need_y)
    if planes == 0:
        return grad_x, grad_y
    with p.on_device():
        gradient_kernel[(planes * tiles,)](
            grads, p.x, p.y, moments, squares, deflated, index, grad_x, grad_y,
            p.groups, p.rows, p.dim, 0 if need_x else p.groups, *p.strides,
            2.0 * scales[0] / x.numel(), scales[1] / (p.groups * p.dim),
            4.0 * scales[2] / (p.groups * p.degrees * p.degrees), *weights, p.degrees, margin, eps,
            VIEWS=p.views, GRAM=p.gram, EACH=grads.numel() == 4, TAKEN=p.taken,
            FORMAT=p.format, PRECISION=p.backward_precision,
            ROWS=height, COLUMNS=width, DEPTH=depth, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return grad_x, grad_y
