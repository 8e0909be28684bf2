"""What a rank multiplies: its rows of the Gram matrix (N < D), or its share of Zc^T Zc (N >= D).

Both give (covariance sum before scaling, over groups and views; scatter of what was multiplied;
squares, everyone, deflated, index as in ranks.py), from own [V, n, G, D] float32, the centred own
rows, and scatter [V, G, D] float64. Half inputs multiply centred values rounded to half.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.distributed import Pending
from vicreg_kernels.products import product
from vicreg_kernels.vicreg.backends import DEFLATED_COLUMNS

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
    own: Tensor, scatter: Tensor, dtype: torch.dtype, rows: list[int], group: Any
) -> tuple[Tensor, ...]:
    """N < D. docs/cancellation.md has the formulas: they hold for each row of Kr, and what is left
    to add over ranks are sums of squares.
    """
    views, count, groups, dim = own.shape
    longest, rank = max(rows), torch.distributed.get_rank(group)
    mine = slice(rank * longest, rank * longest + count)
    everyone = own.new_empty((views, len(rows) * longest, groups, dim), dtype=dtype)
    operands = own.to(dtype)
    arriving: list[Pending] = [
        distributed.start_gather_rows(OP, group, z, rows, out)
        for z, out in zip(operands, everyone, strict=True)
    ]
    index = scatter.topk(min(DEFLATED_COLUMNS, dim), dim=-1).indices
    squares = own.new_empty((views, groups, count, everyone.shape[1]))
    deflated = own.new_empty((*index.shape, count))
    rounded = dtype != torch.float32
    packed = scatter.new_zeros(1 + (scatter.numel() if rounded else 0))
    if rounded:
        packed[1:] = operands.float().square_().sum(dim=1).flatten()
    between_taken = scatter.new_zeros(())
    for v in range(views):
        planes = arriving[v].wait().transpose(0, 1)  # [G, M, D]
        picked = columns(index[v])
        taken = planes[picked].double()  # [G, K, M]
        planes[picked] = 0.0
        kr = product(planes[:, mine], planes.mT)  # [G, n, M]
        wide, own_taken = kr.double(), taken[..., mine]
        along = taken @ wide.mT  # [G, K, n]
        between = taken @ taken.mT
        between.diagonal(dim1=-2, dim2=-1).zero_()
        packed[0] += wide.square().sum() + 2.0 * (own_taken * along).sum()
        between_taken += between.square().sum()
        deflated[v] = along + between @ own_taken
        torch.baddbmm(kr, own_taken.mT.float(), taken.float(), out=squares[v])
    distributed.sum_ranks_(OP, group, packed)
    if rounded:
        scatter = packed[1:].view_as(scatter)
    subtracted = scatter.scatter(-1, index, 0.0).square().sum()
    square = packed[0] + between_taken - subtracted
    return square, scatter, squares.flatten(), everyone.flatten(), deflated, index


def covariance(
    own: Tensor, scatter: Tensor, dtype: torch.dtype, rows: list[int], group: Any
) -> tuple[Tensor, ...]:
    """N >= D: the D x D side, its diagonal left out."""
    views, count, groups, dim = own.shape
    squares = own.new_empty((views, groups, dim, dim))
    total = scatter.new_zeros(())
    for v, begin, part in _summed_chunks(own.to(dtype), group):
        end, before = part.shape[-1], part[..., :begin]
        part.diagonal(begin, dim1=-2, dim2=-1).zero_()
        total += part.double().square().sum() + before.double().square().sum()
        squares[v, :, begin:end, :end] = part
        squares[v, :, :begin, begin:end] = before.mT
    taken = min(DEFLATED_COLUMNS, dim)
    deflated = own.new_zeros((views, groups, taken, count))
    index = torch.zeros((views, groups, taken), dtype=torch.int64, device=own.device)
    return total, scatter, squares.flatten(), own.new_empty(0, dtype=dtype), deflated, index


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
