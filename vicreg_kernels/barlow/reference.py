"""The op in plain PyTorch: the specification every backend is held to.

Written as published (D x D cross-correlation), differentiable by autograd to any order, and
float64-capable. No tricks: what is fast lives in the other backends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_kernels.core import library


def standardise(z: Tensor, eps: float, std_eps: float, unbiased: bool) -> Tensor:
    """(z - mean) / (sqrt(var + eps) + std_eps) over the batch, z: [N, D].

    Without eps under the root it is torch.std, whose derivative at a constant column is 0. NaN
    where the dtype does not hold the variance of finite numbers, which would be divided away.
    """
    correction = 1 if unbiased else 0
    if eps > 0:
        std = torch.sqrt(z.var(dim=0, correction=correction) + eps)
    else:
        std = z.std(dim=0, correction=correction)
    std = std.masked_fill(std.isinf(), torch.nan)
    return (z - z.mean(dim=0)) / (std + std_eps)


def loss(x: Tensor, y: Tensor, eps: float, std_eps: float, unbiased: bool, lambd: float) -> Tensor:
    """sum_i (C_ii - 1)^2 + lambd sum_{i != j} C_ij^2 of x, y: [N, D]; 0-d.

    Half inputs are computed in float32, whatever autocast says.
    """
    with library.no_autocast(x.device):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        first, second = (standardise(z.to(dtype), eps, std_eps, unbiased) for z in (x, y))
        correlation = first.t() @ second / x.shape[0]  # [D, D]
        diagonal = correlation.diagonal()
        mask = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        off_diagonal = correlation.masked_fill(mask, 0.0)
        return (diagonal - 1).square().sum() + lambd * off_diagonal.square().sum()
