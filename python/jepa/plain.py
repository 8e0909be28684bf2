"""The published VICReg loss as its authors compute it: the baseline that the demo runs against.

facebookresearch/vicreg forms the D x D covariance of each view and copies its off-diagonal
elements out with a strided view, squares and sums them. Eager PyTorch, differentiated by autograd,
float64-capable.
"""

from __future__ import annotations

import torch
from torch import Tensor


def off_diagonal(square: Tensor) -> Tensor:
    """The off-diagonal elements of [D, D], row by row: a copy, [D (D - 1)]."""
    edge = square.shape[0]
    # Without its last element the matrix reads as rows of D + 1, each beginning on the diagonal.
    return square.flatten()[:-1].view(edge - 1, edge + 1)[:, 1:].flatten()


def vicreg_loss(
    x: Tensor,
    y: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    margin: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    """x, y: the two views' embeddings, [N, D] -> the loss, a 0-d tensor of their dtype."""
    rows, dim = x.shape
    invariance = torch.nn.functional.mse_loss(x, y)
    variance = covariance = x.new_zeros(())
    for view in (x, y):
        centred = view - view.mean(dim=0)
        std = torch.sqrt(centred.var(dim=0) + eps)  # [D]
        variance = variance + torch.relu(margin - std).mean() / 2
        matrix = centred.T @ centred / (rows - 1)  # [D, D]
        covariance = covariance + off_diagonal(matrix).pow_(2).sum() / dim
    return (
        invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    )
