"""The op in plain PyTorch: the specification every backend is held to.

The statistic is written as published, with all N x M x K angles, differentiable by autograd to any
order, and float64-capable. No tricks: what is fast lives in the other backends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vicreg_kernels.core import library

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _wide_product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit words, by halves: int64 has no 64 bits
    without a sign.
    """
    low = word * (multiplier & 0xFFFF)
    high = word * (multiplier >> 16) + (low >> 16)
    return (high >> 16) & _MASK, ((high << 16) | (low & 0xFFFF)) & _MASK


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., 2011): four 32-bit words of noise, held in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _wide_product(c0, _MULTIPLIERS[0])
        high1, low1 = _wide_product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def _uniform(word: Tensor) -> Tensor:
    """(word + 0.5) 2^-32, rounded as float32 rounds it, in (0, 1)."""
    u = word.to(torch.float32) * 2.0**-32 + 2.0**-33
    return u.clamp(max=1.0 - 2.0**-24).to(torch.float64)


def directions(step: Tensor, seed: int, dim: int, slices: int) -> Tensor:
    """Random unit directions, float32 [dim, slices], on step's device.

    step: int64, 0-d. Philox4x32-10 under the key `seed`; the counter is (i, step), i the index of a
    group of four normals over [slices, ceil(dim / 4)]. Box-Muller makes normals of the words, and
    each column is divided by its length.
    """
    groups = (dim + 3) // 4
    index = torch.arange(slices * groups, device=step.device)
    counter = [index & _MASK, index >> 32]
    counter += [(step & _MASK).expand_as(index), ((step >> 32) & _MASK).expand_as(index)]
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    normals = []
    for one, two in (words[:2], words[2:]):
        radius = (-2.0 * _uniform(one).log()).sqrt()
        angle = 2.0 * math.pi * _uniform(two)
        normals += [radius * angle.cos(), radius * angle.sin()]
    columns = torch.stack(normals, dim=-1).reshape(slices, 4 * groups)[:, :dim]
    columns = columns / torch.linalg.vector_norm(columns, dim=1, keepdim=True)
    return columns.t().to(torch.float32).contiguous()


def loss(
    z: Tensor,
    directions: Tensor,
    knots: Sequence[float],
    weights: Sequence[float],
    count: float,
    factor: float,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """factor * the mean over groups and slices of
    sum_k w_k ((C_k / count - exp(-t_k^2 / 2))^2 + (S_k / count)^2).

    z: [G, N, D]; directions: [D, M] of z's dtype. C and S are sums over rows of cos(t p) and
    sin(t p), with p = z directions; reduce: adds those of the other ranks to [2, G, M, K]. Half
    inputs are computed in float32, whatever autocast says.
    """
    with library.no_autocast(z.device):
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        t = torch.tensor(knots, dtype=dtype, device=z.device)
        w = torch.tensor(weights, dtype=dtype, device=z.device)
        projections = z.to(dtype) @ directions.to(dtype)  # [G, N, M]
        angles = projections.unsqueeze(-1) * t  # [G, N, M, K]
        sums = torch.stack((angles.cos().sum(dim=1), angles.sin().sum(dim=1)))  # [2, G, M, K]
        cosines, sines = (sums if reduce is None else reduce(sums)) / count
        errors = (cosines - torch.exp(-0.5 * t * t)).square() + sines.square()
        return factor * (errors @ w).mean()
