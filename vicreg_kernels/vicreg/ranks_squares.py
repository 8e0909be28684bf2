"""What a rank multiplies: its rows of the Gram matrix (N < D), or its share of Zc^T Zc (N >= D).

Both take own [V, n, G, D] float32, the centred own rows, and scatter [V, G, D] float64, and give
(covariance sum before scaling, over groups and views; scatter of what was multiplied; a view's
covariance gradient before scaling, sum_{i != j} z_i (z_i . z_j) for column j at the own rows,
[G, n, D] float32, or empty where it is not needed). Half inputs multiply centred values rounded to
half, and what the Gram side subtracts is made of those very values, as in the cuda backend.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.distributed import Pending
from vicreg_kernels.distributed.batch_statistics import product, square_product
from vicreg_kernels.vicreg.contract import DEFLATED_COLUMNS

OP = "vicreg"
# Elements of a chunk of the covariance that is summed over ranks, and its least height: large
# enough for the network's bandwidth and the product's speed, small beside D x D.
CHUNK_ELEMENTS = 1 << 20
CHUNK_ROWS = 128
# Chunks on their way at a time.
IN_FLIGHT = 2


def columns(index: Tensor) -> tuple[Tensor, slice, Tensor]:
    """What picks columns index [G, K] of [G, n, D] as [G, K, n]."""
    return torch.arange(len(index), device=index.device).unsqueeze(1), slice(None), index


def gram(
    own: Tensor,
    scatter: Tensor,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
    rows: list[int],
    group: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """N < D. docs/cancellation.md has the formulas: they hold for each row of Kr, and what is left
    to add over ranks are sums of squares.
    """
    views, count, _, dim = own.shape
    longest, rank = max(rows), torch.distributed.get_rank(group)
    mine = slice(rank * longest, rank * longest + count)
    operands = own.to(dtype)
    arriving = [distributed.start_gather_rows(OP, group, z, rows) for z in operands]
    index = scatter.topk(min(DEFLATED_COLUMNS, dim), dim=-1).indices
    rounded = dtype != torch.float32
    packed = scatter.new_zeros(1 + (scatter.numel() if rounded else 0))
    if rounded:
        packed[1:] = operands.float().square_().sum(dim=1).flatten()
    between_deflated = scatter.new_zeros(())
    factors = []
    for v in range(views):
        planes = arriving[v].wait().transpose(0, 1)  # [G, M, D], M = ranks * longest
        picked = columns(index[v])
        deflated_columns = planes[picked].double()  # [G, K, M]
        planes[picked] = 0.0
        kr = product(planes[:, mine], planes.mT)  # [G, n, M]
        wide, own_deflated = kr.double(), deflated_columns[..., mine]
        along = deflated_columns @ wide.mT  # [G, K, n]
        between = deflated_columns @ deflated_columns.mT
        between.diagonal(dim1=-2, dim2=-1).zero_()
        packed[0] += wide.square().sum() + 2.0 * (own_deflated * along).sum()
        between_deflated += between.square().sum()
        if needs[v]:
            kr.baddbmm_(own_deflated.mT.float(), deflated_columns.float())
            factors.append((kr, planes, (along + between @ own_deflated).float()))
    summing = distributed.start_sum_ranks_(OP, group, packed)
    gradients = [own.new_empty(0) for _ in range(views)]
    for v in range(views):
        if needs[v]:
            kr, planes, deflated = factors.pop(0)
            gradients[v] = square_product(kr, planes)
            gradients[v][columns(index[v])] = deflated
    summing.wait()
    if rounded:
        scatter = packed[1:].view_as(scatter)
    left = scatter.scatter(-1, index, 0.0)
    for v in range(views):
        if needs[v]:
            gradients[v].addcmul_(
                operands[v].transpose(0, 1), left[v].float().unsqueeze(1), value=-1
            )
    return packed[0] + between_deflated - left.square().sum(), scatter, gradients


def covariance(
    own: Tensor,
    scatter: Tensor,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
    rows: list[int],
    group: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """N >= D: the D x D side, its diagonal left out."""
    views, _, groups, dim = own.shape
    operands = own.to(dtype)
    squares = own.new_empty((views, groups, dim, dim))
    total = scatter.new_zeros(())
    for v, begin, part in _summed_chunks(operands, group):
        end, before = begin + part.shape[1], part[..., :begin]
        part.diagonal(begin, dim1=-2, dim2=-1).zero_()
        total += part.double().square().sum() + before.double().square().sum()
        squares[v, :, begin:end, :end] = part
        squares[v, :, :begin, begin:end] = before.mT
    gradients = [own.new_empty(0) for _ in range(views)]
    for v in range(views):
        if needs[v]:
            # The square on the left, where its rows can be scaled; [G, D, n] turned back.
            turned = square_product(squares[v], operands[v].permute(1, 2, 0))
            gradients[v] = turned.mT.contiguous()
    return total, scatter, gradients


def _summed_chunks(own: Tensor, group: Any) -> Iterator[tuple[int, int, Tensor]]:
    """(view, first row, [G, height, end]): the lower trapezoids of Zc^T Zc of all ranks' rows, each
    summed over ranks while the next are multiplied.
    """
    views, _, groups, dim = own.shape
    height = min(dim, max(CHUNK_ROWS, CHUNK_ELEMENTS // (groups * dim)))
    flying: deque[tuple[int, int, Pending]] = deque()
    for v in range(views):
        planes = own[v].transpose(0, 1)  # [G, n, D]
        for begin in range(0, dim, height):
            end = min(begin + height, dim)
            part = product(planes[..., begin:end].mT, planes[..., :end])
            flying.append((v, begin, distributed.start_sum_ranks_(OP, group, part)))
            if len(flying) > IN_FLIGHT:
                view, first, pending = flying.popleft()
                yield view, first, pending.wait()
    for view, first, pending in flying:
        yield view, first, pending.wait()
