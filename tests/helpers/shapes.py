"""Shapes, memory layouts and difficult embeddings that the tests draw from."""

from __future__ import annotations

import torch
from torch import Tensor

# [N, D]: 2, 3, odd, prime, just off the powers of two that tiles are made of; N < D, N = D, N > D.
SMALL = [(2, 2), (2, 3), (3, 2), (3, 3), (2, 1), (3, 4), (4, 5), (2, 67), (67, 2), (5, 5)]
MEDIUM = [(13, 17), (17, 13), (31, 33), (33, 31), (64, 64), (65, 129), (129, 65), (127, 127)]
LARGE = [(127, 521), (521, 127), (64, 1031), (1031, 64), (256, 255), (255, 256)]
# Of these Triton compiles kernels on a GPU: fewest rows and columns, a square, both sides of tiles.
FEW = [(2, 3), (3, 2), (2, 67), (5, 5), (64, 64), (65, 129), (129, 65), (127, 521), (1031, 64)]
# [G, N, D]: groups on both sides, and one group.
GROUPED = [(1, 6, 5), (3, 4, 6), (5, 7, 7), (49, 64, 48), (49, 48, 64), (2, 2, 5)]


def randn(
    *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Drawn on the CPU, so that every device sees the same numbers."""
    return torch.randn(*shape).mul_(scale).to(device=device, dtype=dtype)


def contiguous(rows: int, dim: int, **where: object) -> Tensor:
    return randn(rows, dim, **where)


def transposed(rows: int, dim: int, **where: object) -> Tensor:
    return randn(dim, rows, **where).t()


def strided(rows: int, dim: int, **where: object) -> Tensor:
    return randn(2 * rows, 3 * dim, **where)[::2, ::3]


def sliced(rows: int, dim: int, **where: object) -> Tensor:
    """Rows that start at no aligned address."""
    return randn(rows + 1, dim + 5, **where)[1:, 5:]


def expanded(rows: int, dim: int, **where: object) -> Tensor:
    """Every column the same memory: stride 0, all columns perfectly correlated."""
    return randn(rows, 1, **where).expand(rows, dim)


LAYOUTS = {f.__name__: f for f in (contiguous, transposed, strided, sliced, expanded)}
# What Triton compiles of them: layouts of two views, and whether there are fewer rows than columns.
# `collapsed` has a stride of 0 too.
FEW_LAYOUTS = [("transposed", "transposed", True), ("strided", "sliced", False)]


def collapsed(rows: int, dim: int, **where: object) -> Tensor:
    """Every row the same memory, stride 0; small multiples of 1/8, whose means are exact."""
    return torch.round(8 * randn(1, dim)).div(8).to(**where).expand(rows, dim)


def dominated(rows: int, dim: int, scale: float, count: int = 1) -> Tensor:
    """`count` dimensions, spread over the range, `scale` times the others."""
    z = torch.randn(rows, dim)
    z[:, torch.linspace(1, dim - 2, count).long()] *= scale
    return z


def decaying(rows: int, dim: int, ratio: float) -> Tensor:
    """Scales that fall geometrically from 1000 to 1 and stay there, in shuffled order."""
    scales = 1000.0 * ratio ** torch.arange(dim, dtype=torch.float64)
    return torch.randn(rows, dim) * scales.clamp(min=1.0).float()[torch.randperm(dim)]


def white(rows: int, dim: int) -> Tensor:
    """Columns centred, orthonormal up to float32 rounding: identity covariance. rows > dim."""
    z = torch.randn(rows, dim, dtype=torch.float64)
    q, _ = torch.linalg.qr(z - z.mean(dim=0))
    return (q * (rows - 1) ** 0.5).float()
