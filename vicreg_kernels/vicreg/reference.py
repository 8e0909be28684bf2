"""The op in plain PyTorch: the specification every backend is held to.

Written as published (D x D covariance, diagonal left out), differentiable by autograd to any
order, and float64-capable. No tricks: what is fast lives in the other backends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_kernels.core import library


def _per_view(z: Tensor, margin: float, eps: float, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Hinge and off-diagonal sum of squares of one view, z: [G, N, D]; each the mean over G."""
    rows, dim = z.shape[-2:]
    correction = 1 if unbiased else 0
    centred = z - z.mean(dim=-2, keepdim=True)
    std = torch.sqrt(centred.square().sum(dim=-2) / (rows - correction) + eps)  # [G, D]
    hinge = torch.relu(margin - std).mean()
    covariance = centred.transpose(-1, -2) @ centred / (rows - correction)  # [G, D, D]
    diagonal = torch.eye(dim, dtype=torch.bool, device=z.device)
    off_diagonal = covariance.masked_fill(diagonal, 0.0).square().sum(dim=(-2, -1)).mean()
    return hinge, off_diagonal


def terms(
    x: Tensor,
    y: Tensor | None,
    margin: float,
    eps: float,
    unbiased: bool,
    scales: tuple[float, float, float],
    weights: tuple[float, float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, invariance, variance, covariance) of x and, unless it is None, y: [G, N, D].

    scales turn the raw quantities of `conventions.py` (summed over views) into the terms; weights
    add the terms up to the loss. Half inputs are computed in float32, whatever autocast says.
    """
    with library.no_autocast(x.device):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.to(dtype)
        variance, covariance = _per_view(x, margin, eps, unbiased)
        invariance = variance.new_zeros(())
        if y is not None:
            y = y.to(dtype)
            variance_y, covariance_y = _per_view(y, margin, eps, unbiased)
            variance = variance + variance_y
            covariance = covariance + covariance_y
            invariance = (x - y).square().mean()
        invariance = scales[0] * invariance
        variance = scales[1] * variance
        covariance = scales[2] * covariance
        loss = weights[0] * invariance + weights[1] * variance + weights[2] * covariance
        return loss, invariance, variance, covariance
