"""Detects a collapse of a representation and measures its spread."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Beyond these limits a warning names the kind of collapse.
LEAST_RANK_SHARE = 0.02
LEAST_STD = 1e-3
MOST_CORRELATION = 0.95


@dataclass(frozen=True)
class Spread:
    """How far features spread. effective_rank: exp of the entropy of the covariance's normalised
    eigenvalues (Roy and Vetterli, 2007), from 1 to `dim`; std: the mean standard deviation of the
    dimensions, in the features' unit; correlation: the mean absolute off-diagonal correlation;
    collapsed: the number of dimensions with a standard deviation near 0.
    """

    effective_rank: float
    std: float
    correlation: float
    collapsed: int
    dim: int

    def warnings(self) -> list[str]:
        warnings = []
        if self.std < LEAST_STD:
            warnings.append(f"complete collapse: mean standard deviation {self.std:.1e}")
        elif self.effective_rank < max(1.5, LEAST_RANK_SHARE * self.dim):
            warnings.append(f"dimensional collapse: effective rank {self.effective_rank:.1f}")
        if self.collapsed and self.std >= LEAST_STD:
            warnings.append(f"{self.collapsed} of {self.dim} dimensions are constant")
        if self.correlation > MOST_CORRELATION:
            warnings.append(f"redundancy: mean absolute correlation {self.correlation:.2f}")
        return warnings


@torch.no_grad()
def spread(features: Tensor) -> Spread:
    """The spread of features [N, D], N >= 2."""
    z = features.detach().double()
    z = z - z.mean(dim=0)
    std = z.square().sum(dim=0).div(len(z) - 1).sqrt()
    values = torch.linalg.svdvals(z).square()
    share = values / values.sum().clamp_min(1e-300)
    share = share[share > 0]
    rank = float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0
    unit = z / z.norm(dim=0).clamp_min(1e-300)
    correlation = unit.T @ unit
    dim = z.shape[1]
    off = (correlation.abs().sum() - correlation.diagonal().abs().sum()) / max(1, dim * (dim - 1))
    return Spread(rank, float(std.mean()), float(off), int((std < LEAST_STD).sum()), dim)
