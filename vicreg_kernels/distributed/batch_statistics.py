"""What a rank computes of its share of a batch, in plain torch: the column statistics of the whole
batch, and products with float32 results of half operands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vicreg_kernels.distributed.collectives import sum_ranks_


def two_floats(mean: Tensor) -> tuple[Tensor, Tensor]:
    """Split float64 into the sum of two float32, so that a large common offset costs no digits."""
    high = mean.float()
    return high, (mean - high).float()


def statistics(
    op: str, x: Tensor, y: Tensor | None, rows: list[int], group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (own [V, n, G, D] float32, this rank's rows less the whole batch's mean; mean and
    scatter [V, G, D] float64 of the whole batch; its sum of (x - y)^2, float64).

    They need one sum over ranks, of N mean and scatter + N mean^2. In float64 the second loses
    2^-53 (mean / std)^2, less than float32 rows with such a mean have lost already.
    """
    views = (x,) if y is None else (x, y)
    groups, count, dim = x.shape
    own = x.new_empty((len(views), count, groups, dim), dtype=torch.float32)
    packed = x.new_zeros(2 * own[:, 0].numel() + 1, dtype=torch.float64)
    sums, squares = packed[:-1].view(2, len(views), groups, dim)
    origin = own.new_empty((len(views), groups, dim))
    for v, z in enumerate(views):
        # About the rounded mean of the own rows, so that float32 sums are of small numbers.
        torch.mean(z, dim=-2, dtype=torch.float32, out=origin[v])
        shifted = torch.sub(z, origin[v].unsqueeze(1), out=own[v].transpose(0, 1))
        wide, first = origin[v].double(), shifted.sum(dim=-2).double()
        sums[v] = wide * count + first
        squares[v] = wide.square() * count + 2.0 * wide * first
        squares[v] += shifted.square().sum(dim=-2)
    if y is not None:
        packed[-1] = (x.float() - y.float()).square_().sum(dim=-1).sum(dtype=torch.float64)
    sum_ranks_(op, group, packed)
    mean = sums / sum(rows)
    scatter = (squares - sums * mean).clamp(min=0.0)
    own.sub_((mean - origin).float().unsqueeze(1))
    return own, mean, scatter, packed[-1]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, of float32 or half operands; [G, ., .] each."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def square_product(square: Tensor, z: Tensor) -> Tensor:
    """square @ z in float32, [G, ., .] each; square float32, z float32 or half."""
    if z.dtype == torch.float32:
        return torch.bmm(square, z)
    # Rounded to half, each row scaled by a power of two: float16 neither over- nor underflows.
    power = torch.frexp(square.abs().amax(dim=-1, keepdim=True)).exponent
    return torch.ldexp(product(torch.ldexp(square, -power).to(z.dtype), z), power)
