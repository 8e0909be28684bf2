"""Launchers of the VICReg op's Triton kernels.

Launches: forward 4 on the Gram side and for few rows (statistics, product, strips, terms; one less
where the D x D product needs no split), one more where rows are many enough to split the
statistics, one more with TMA operands (centring; tma.py says where); backward 1. Nothing waits for
the device, and allocation depends on shapes alone, so both can be captured in a CUDA graph. With
N < D a view's rows are read twice forward and once backward from memory, where the triangle's tiles
share them through L2. GPU times: not measured yet.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vicreg_kernels.core.triton.device import device_of, on_device, operand_format
from vicreg_kernels.vicreg import contract
from vicreg_kernels.vicreg.triton import configs, tma
from vicreg_kernels.vicreg.triton.backward import gradient_kernel
from vicreg_kernels.vicreg.triton.forward import product_kernel, strips_kernel, terms_kernel
from vicreg_kernels.vicreg.triton.statistics import merge_kernel, statistics_kernel
from vicreg_kernels.vicreg.triton.tma_products import (
    centre_kernel,
    symmetric_kernel,
    tiled_gradient_kernel,
)


class LaunchPlan:
    """What a launch needs to know of its inputs."""

    def __init__(self, x: Tensor, y: Tensor | None, unbiased: bool, tf32x3: bool) -> None:
        self.x, self.y = x, x if y is None else y
        self.views = 1 if y is None else 2
        self.groups, self.rows, self.dim = x.shape
        self.planes = self.views * self.groups
        self.gram = self.rows < self.dim
        self.side, self.length = min(self.rows, self.dim), max(self.rows, self.dim)
        # The D x D side takes none, and is not compiled for how many there are.
        self.deflated_count = min(contract.DEFLATED_COLUMNS, self.dim) if self.gram else 0
        self.degrees = float(self.rows - (1 if unbiased else 0))
        name, self.processors, _ = device_of(x)
        self.format, self.forward_precision, self.backward_precision = operand_format(x, tf32x3)
        self.config = configs.nearest(name, self.format, self.rows, self.dim)
        self.tma = tma.takes(x)
        if self.tma:
            self.config = configs.with_tma(self.config, self.rows, self.dim)
        between = [z.stride(0) if self.groups > 1 else _of_one_group(z) for z in (x, self.y)]
        self.strides = (between[0], *x.stride()[1:], between[1], *self.y.stride()[1:])

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)


def _of_one_group(z: Tensor) -> int:
    """What stands for the stride between groups where there is one: that of its rows or columns, so
    that no kernel is compiled for whether 16 divides it.
    """
    longest = max(z.stride()[1:])
    return longest if longest > 1 else 0


def _row_blocks(p: LaunchPlan, blocks: int) -> tuple[int, int]:
    """(row blocks, rows in each) of the statistics: one while columns fill the GPU or rows are few,
    and for rounded operands on the Gram side, whose scatter takes a second look at the rows.
    """
    step, limit = p.config.statistics[0], p.config.block_rows
    if p.rows <= limit or (p.gram and p.format != "fp32"):
        return 1, p.rows
    wanted = min(triton.cdiv(2 * p.processors, p.groups * blocks), triton.cdiv(p.rows, limit))
    height = step * triton.cdiv(triton.cdiv(p.rows, wanted), step)
    return triton.cdiv(p.rows, height), height


def _splits(p: LaunchPlan, tiles: int) -> tuple[int, int]:
    """(splits, length of each) of the product's reduction: enough to fill the GPU, few enough that
    the parts take no more memory than the inputs.
    """
    depth = p.config.product[1]
    wanted = p.config.occupancy * p.processors // (tiles * p.planes)
    steps = triton.cdiv(p.length, depth)
    splits = max(1, min(wanted, p.length // p.side, steps))
    chunk = depth * triton.cdiv(steps, splits)
    return triton.cdiv(p.length, chunk), chunk


# Rows and columns of a tile of the centring pass, its warps, and tiles of rows a program does: the
# candidates' merge, about 3 us, once for 128 x 128 elements.
_CENTRE = (16, 128, 4, 8)


class _Columns:
    """What the Gram side's statistics tell its product: candidates for the columns of largest
    scatter, and what the product tells `strips_kernel`: the deflated columns, and the others' sum.
    """

    def __init__(self, p: LaunchPlan, blocks: int, diagonal: Tensor) -> None:
        planes = p.planes if p.gram else 0
        self.blocks, self.diagonal = blocks, diagonal
        self.candidates = p.empty(planes, blocks, 5)
        self.candidate_index = p.empty(planes, blocks, 4, dtype=torch.int32)
        self.deflated_columns = p.empty(planes, 4, p.rows)
        # At least 512, so that one kernel serves up to 128 blocks of columns, D = 8192.
        self.width = max(512, triton.next_power_of_2(4 * blocks))


class _Product:
    """The symmetric product of a forward: its grid, where it puts the matrix and the sums."""

    def __init__(self, p: LaunchPlan) -> None:
        if p.tma:
            height, width, *_ = p.config.tma_product
            across = triton.cdiv(p.side, width)
            self.tiles = width // height * (across * (across + 1) // 2)
            self.splits, self.chunk = 1, p.length
        else:
            across = triton.cdiv(p.side, p.config.product[0])
            self.tiles = across * (across + 1) // 2
            self.splits, self.chunk = _splits(p, self.tiles)
        self.whole = not p.gram and self.splits == 1

    def launch(
        self, p: LaunchPlan, columns: _Columns, moments: Tensor, out: Tensor, sums: Tensor,
        index: Tensor,
    ) -> None:  # fmt: skip
        tile, depth, warps, stages = p.config.product
        product_kernel[(p.planes * self.splits * self.tiles,)](
            p.x, p.y, moments, out, sums, columns.candidates, columns.candidate_index, index,
            columns.deflated_columns, columns.diagonal,
            p.groups, p.rows, p.dim, p.side, columns.blocks, self.splits, self.chunk, *p.strides,
            p.degrees,
            GRAM=p.gram, WHOLE=self.whole, FORMAT=p.format, PRECISION=p.forward_precision,
            DEFLATED=p.deflated_count, WIDTH=columns.width,
            TILE=tile, DEPTH=depth, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def launch_tma(
        self, p: LaunchPlan, columns: _Columns, moments: Tensor, out: Tensor, sums: Tensor,
        index: Tensor, centred: Tensor,
    ) -> None:  # fmt: skip
        height, width, warps, steps = _CENTRE
        row_blocks = triton.cdiv(p.rows, height * steps)
        centre_kernel[(p.planes * row_blocks * triton.cdiv(p.dim, width),)](
            p.x, p.y, moments, centred, columns.candidates, columns.candidate_index, index,
            columns.deflated_columns, columns.diagonal,
            p.groups, p.rows, p.dim, columns.blocks, row_blocks, *p.strides,
            GRAM=p.gram, FORMAT=p.format, DEFLATED=p.deflated_count, WIDTH=columns.width,
            ROWS=height, COLUMNS=width, STEPS=steps, num_warps=warps,
        )  # fmt: skip
        height, width, depth, warps, stages, band = p.config.tma_product
        a, b = ((height, depth), (width, depth)) if p.gram else ((depth, height), (depth, width))
        symmetric_kernel[(p.planes * self.tiles,)](
            _described(centred, a), _described(centred, b),
            _described(out, (height, width)), _described(out, (width, height)), sums,
            p.side, p.length, p.degrees,
            GRAM=p.gram, FORMAT=p.format, ROWS=height, COLUMNS=width, DEPTH=depth, BAND=band,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _described(planes: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A TMA descriptor of contiguous [..., R, C] as [planes, R, C], with tiles of one plane."""
    flat = planes.view(-1, *planes.shape[-2:])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, *block])


def forward(
    x: Tensor,
    y: Tensor | None,
    margin: float,
    eps: float,
    unbiased: bool,
    scales: list[float],
    weights: list[float],
    tf32x3: bool = False,
) -> tuple[Tensor, ...]:
    """The six tensors of op.py for x, y: [G, N, D]."""
    p = LaunchPlan(x, y, unbiased, tf32x3)
    saved = contract.empty_saved(x, p.views, "triton")
    terms, moments, squares, deflated, index, centred = saved
    height, width, warps = p.config.statistics
    blocks = triton.cdiv(p.dim, width)
    row_blocks, block_rows = _row_blocks(p, blocks)
    product = _Product(p)
    strip, strip_width, strip_warps = p.config.strips
    strips = triton.cdiv(p.side, strip)

    partial_rows = 0 if row_blocks == 1 else p.planes * row_blocks
    partials = p.empty(partial_rows, 2, p.dim)
    counts = (
        p.groups * row_blocks * blocks if p.views == 2 else 0,
        p.planes * blocks,
        p.planes * (product.tiles if product.whole else strips),
    )
    # Each slice begins at 16 bytes, so that no kernel is compiled for where the one before it ends.
    lengths = [count + count % 2 for count in (*counts, p.planes)]
    partial_sums = p.empty(sum(lengths), dtype=torch.float64)
    differences, hinges, sums, diagonal = partial_sums.split(lengths)
    columns = _Columns(p, blocks, diagonal)
    # The product writes `squares` where nothing is to be added to it in float32.
    direct = product.splits == 1 and (product.whole or squares.dtype == torch.float32)
    parts = squares if direct else p.empty(p.planes, product.splits, p.side, p.side)

    with on_device(x):
        statistics_kernel[(p.groups * row_blocks * blocks,)](
            p.x, p.y, moments, partials, hinges, differences,
            columns.candidates, columns.candidate_index,
            p.groups, p.rows, p.dim, row_blocks, block_rows, *p.strides, p.degrees, margin, eps,
            VIEWS=p.views, GRAM=p.gram, FINAL=row_blocks == 1, FORMAT=p.format,
            ROWS=height, COLUMNS=width, num_warps=warps,
        )  # fmt: skip
        if row_blocks > 1:
            merge_kernel[(p.planes * blocks,)](
                p.x, p.y, moments, partials, hinges, columns.candidates, columns.candidate_index,
                p.groups, p.rows, p.dim, row_blocks, block_rows,
                *(p.strides[i] for i in (0, 2, 3, 5)), p.degrees, margin, eps,
                GRAM=p.gram, ROWS=height, COLUMNS=width, num_warps=warps,
            )  # fmt: skip
        if p.tma:
            stored = centred.numel() > 0
            operands = centred if stored else p.empty(p.planes, p.rows, p.dim, dtype=x.dtype)
            product.launch_tma(p, columns, moments, parts, sums, index, operands)
        else:
            product.launch(p, columns, moments, parts, sums, index)
        if not product.whole:
            strips_kernel[(p.planes * strips,)](
                parts, squares, sums, columns.deflated_columns, deflated, diagonal, p.side,
                product.splits, p.degrees, GRAM=p.gram, DEFLATED=p.deflated_count,
                ROUND=p.format == "bf16 in fp32" and squares.dtype == x.dtype,
                STRIP=strip, WIDTH=strip_width, num_warps=strip_warps,
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
    tf32x3: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and y, contiguous, empty where not needed. grads: float32 [1] or [4]."""
    p = LaunchPlan(x, y, unbiased, tf32x3)
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_y = x.new_empty(x.shape if need_y else (0,))
    planes = p.groups * (need_x + need_y)
    if planes == 0:
        return grad_x, grad_y
    sizes = p.groups, p.rows, p.dim
    shared = (
        0 if need_x else p.groups, int(grads.numel() == 4), *p.strides,
        2.0 * scales[0] / x.numel(), scales[1] / (p.groups * p.dim),
        4.0 * scales[2] / (p.groups * p.degrees * p.degrees), *weights, p.degrees, margin, eps,
    )  # fmt: skip
    with on_device(x):
        if tma.saves_operands(x):
            height, width, depth, warps, stages, band = p.config.tma_gradient
            tiles = triton.cdiv(p.rows, height) * triton.cdiv(p.dim, width)
            a, b = (squares, centred) if p.gram else (centred, squares)
            tiled_gradient_kernel[(planes * tiles,)](
                _described(a, (height, depth)), _described(b, (depth, width)),
                grads, p.x, p.y, moments, deflated, index, grad_x, grad_y, *sizes, *shared,
                VIEWS=p.views, GRAM=p.gram, DEFLATED=p.deflated_count, FORMAT=p.format,
                ROWS=height, COLUMNS=width, DEPTH=depth, BAND=band,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
        else:
            height, width, depth, warps, stages = p.config.gradient
            tiles = triton.cdiv(p.rows, height) * triton.cdiv(p.dim, width)
            gradient_kernel[(planes * tiles,)](
                grads, p.x, p.y, moments, squares, deflated, index, grad_x, grad_y,
                *sizes, p.side, *shared,
                VIEWS=p.views, GRAM=p.gram, DEFLATED=p.deflated_count,
                FORMAT=p.format, PRECISION=p.backward_precision,
                ROWS=height, COLUMNS=width, DEPTH=depth, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return grad_x, grad_y
