"""Launchers of the Barlow Twins op's Triton kernels.

Launches: forward 4 (statistics, product, combine, loss; one less where the D x D product needs no
split) or 5 where rows are many enough to split the statistics; backward 2 (N < D: product, finish;
else the squares of C, product). Nothing waits for the device, and allocation depends on shapes
alone, so both can be captured in a CUDA graph. No standardised copy is stored: with N < D a view's
rows are read twice forward and twice backward from memory, where tiles share them through L2.

At 2048 x 8192 the products are 2 N^2 D operations forward, in triangular tiles, and 4 N^2 D
backward: 206 GFLOP, a quarter of the published form's 6 N D^2. GPU times: not measured yet.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vicreg_kernels.barlow import contract
from vicreg_kernels.barlow.triton import configs
from vicreg_kernels.barlow.triton.backward import (
    cross_squares_kernel,
    finish_kernel,
    gradient_kernel,
)
from vicreg_kernels.barlow.triton.forward import (
    combine_kernel,
    cross_kernel,
    gram_kernel,
    loss_kernel,
)
from vicreg_kernels.barlow.triton.statistics import merge_kernel, statistics_kernel
from vicreg_kernels.core.triton.device import device_of, on_device, operand_format


class LaunchPlan:
    """What a launch needs to know of its inputs."""

    def __init__(
        self, x: Tensor, y: Tensor, eps: float, std_eps: float, unbiased: bool, tf32x3: bool
    ) -> None:
        self.x, self.y = x, y
        self.rows, self.dim = x.shape
        self.gram = self.rows < self.dim
        self.side, self.length = min(x.shape), max(x.shape)
        self.scale = (float(self.rows - (1 if unbiased else 0)), eps, std_eps)
        name, self.processors, _ = device_of(x)
        self.format, self.forward_precision, self.backward_precision = operand_format(x, tf32x3)
        self.config = configs.choose(name, self.format, self.rows, self.dim)
        self.strides = (*x.stride(), *y.stride())

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)


def _row_blocks(p: LaunchPlan, blocks: int) -> tuple[int, int]:
    """(row blocks, rows in each) of the statistics: one while columns fill the GPU or rows are few,
    and for rounded operands on the Gram side, whose diagonal takes a second look at the rows.
    """
    step, limit = p.config.statistics[0], p.config.block_rows
    if p.rows <= limit or (p.gram and p.format != "fp32"):
        return 1, p.rows
    wanted = min(triton.cdiv(2 * p.processors, blocks), triton.cdiv(p.rows, limit))
    height = step * triton.cdiv(triton.cdiv(p.rows, wanted), step)
    return triton.cdiv(p.rows, height), height


def _splits(p: LaunchPlan, tiles: int) -> tuple[int, int]:
    """(splits, length of each) of the product's reduction: enough to fill the GPU, few enough that
    the parts take no more memory than the inputs.
    """
    depth = p.config.product[1]
    steps = triton.cdiv(p.length, depth)
    wanted = p.config.occupancy * p.processors // tiles
    splits = max(1, min(wanted, p.length // p.side, steps // p.config.least_steps))
    chunk = depth * triton.cdiv(steps, splits)
    return triton.cdiv(p.length, chunk), chunk


def forward(
    x: Tensor,
    y: Tensor,
    eps: float,
    std_eps: float,
    unbiased: bool,
    lambd: float,
    tf32x3: bool = False,
) -> tuple[Tensor, ...]:
    """The five tensors of op.py for x, y: [N, D]."""
    p = LaunchPlan(x, y, eps, std_eps, unbiased, tf32x3)
    saved = contract.empty_saved(x, "triton")
    loss, moments, diagonal, products, _ = saved
    height, width, warps = p.config.statistics
    blocks = triton.cdiv(p.dim, width)
    row_blocks, block_rows = _row_blocks(p, blocks)
    tile, depth, product_warps, stages = p.config.product
    across = triton.cdiv(p.side, tile)
    tiles = across * (across + 1) // 2 if p.gram else across * across
    splits, chunk = _splits(p, 2 * tiles if p.gram else tiles)
    whole_cross = not p.gram and splits == 1
    small, each, combine_warps = p.config.combine if splits > 1 else p.config.inner
    edge = triton.cdiv(p.side, small)
    pieces = 0 if whole_cross else edge * (edge + 1) // 2 if p.gram else edge * edge
    count = pieces or tiles

    partials = p.empty(0 if row_blocks == 1 else row_blocks, 5, p.dim)
    # Each slice begins at 16 bytes, so that no kernel is compiled for where the one before it ends.
    lengths = [n + n % 2 for n in (blocks, blocks, count)]
    partial_sums = p.empty(sum(lengths), dtype=torch.float64)
    invariances, taken, sums = partial_sums.split(lengths)
    parts = products if splits == 1 else p.empty(splits, products.shape[0], p.side, p.side)
    factor = lambd / p.rows**2 if p.gram else lambd
    # Left to itself, Triton 3.6's ptxas takes 96 there for sm_80 and spills two values. Rows that
    # begin at no aligned address need 168.
    registers = {"maxnreg": 168} if p.format == "fp16" and tile <= 64 and splits > 1 else {}

    with on_device(x):
        statistics_kernel[(row_blocks * blocks,)](
            x, y, moments, diagonal, partials, invariances, taken,
            p.rows, p.dim, row_blocks, block_rows, *p.strides, *p.scale,
            GRAM=p.gram, FINAL=row_blocks == 1, FORMAT=p.format,
            ROWS=height, COLUMNS=width, num_warps=warps,
        )  # fmt: skip
        if row_blocks > 1:
            merge_kernel[(blocks,)](
                x, y, moments, diagonal, partials, invariances, taken,
                p.rows, p.dim, row_blocks, block_rows, x.stride(1), y.stride(1), *p.scale,
                GRAM=p.gram, ROWS=height, COLUMNS=width, num_warps=warps,
            )  # fmt: skip
        if p.gram:
            gram_kernel[(2 * splits * tiles,)](
                x, y, moments, parts, p.rows, p.dim, splits, chunk, *p.strides, *p.scale,
                WHOLE=splits == 1, FORMAT=p.format, PRECISION=p.forward_precision,
                TILE=tile, DEPTH=depth, num_warps=product_warps, num_stages=stages, **registers,
            )  # fmt: skip
        else:
            cross_kernel[(splits * tiles,)](
                x, y, moments, parts, sums, p.rows, p.dim, splits, chunk, *p.strides, *p.scale,
                WHOLE=splits == 1, FORMAT=p.format, PRECISION=p.forward_precision,
                TILE=tile, DEPTH=depth, num_warps=product_warps, num_stages=stages,
            )  # fmt: skip
        if pieces > 0:
            combine_kernel[(pieces,)](
                parts, products, sums, p.side, splits, p.rows,
                GRAM=p.gram, WHOLE=splits == 1, TILE=small,
                EACH=each, num_warps=combine_warps,
            )  # fmt: skip
        loss_kernel[(1,)](
            loss, invariances, taken, sums, blocks, count, factor,
            GRAM=p.gram, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return saved


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    moments: Tensor,
    diagonal: Tensor,
    products: Tensor,
    standardised: Tensor,
    need_x: bool,
    need_y: bool,
    eps: float,
    std_eps: float,
    unbiased: bool,
    lambd: float,
    tf32x3: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and y, contiguous, empty where not needed. grad: float32 [1]."""
    p = LaunchPlan(x, y, eps, std_eps, unbiased, tf32x3)
    grads = [x.new_empty(x.shape if need else (0,)) for need in (need_x, need_y)]
    views = int(need_x) + int(need_y)
    if views == 0:
        return grads[0], grads[1]
    height, width, depth, warps, stages = p.config.gradient
    down = triton.cdiv(p.rows, height)
    out = grads
    if not p.gram:
        sums = p.empty(2, p.dim)
    else:
        sums = p.empty(2, down, p.dim)
        if x.dtype != torch.float32:
            out = [p.empty(*g.shape) for g in grads]
    with on_device(x):
        if not p.gram:
            strip, strip_width, strip_warps = p.config.squares
            cross_squares_kernel[(triton.cdiv(p.dim, strip),)](
                products, sums, p.dim, STRIP=strip, WIDTH=strip_width, num_warps=strip_warps
            )
        gradient_kernel[(views * down * triton.cdiv(p.dim, width),)](
            grad, x, y, moments, diagonal, products, sums, *out,
            p.rows, p.dim, p.side, 0 if need_x else 1, *p.strides, lambd, *p.scale,
            GRAM=p.gram, FORMAT=p.format, PRECISION=p.backward_precision,
            ROWS=height, COLUMNS=width, DEPTH=depth, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if p.gram:
            step, wide, finish_warps = p.config.finish
            across = triton.cdiv(p.dim, wide)
            wanted = max(1, p.config.finish_occupancy * p.processors // across)
            block_rows = step * triton.cdiv(triton.cdiv(p.rows, wanted), step)
            finish_kernel[(across * triton.cdiv(p.rows, block_rows),)](
                grad, x, y, moments, diagonal, sums, *out, *grads,
                p.rows, p.dim, down, block_rows, *p.strides, lambd, *p.scale,
                NEED_X=need_x, NEED_Y=need_y, FORMAT=p.format,
                ROWS=step, COLUMNS=wide, num_warps=finish_warps,
            )  # fmt: skip
    return grads[0], grads[1]
