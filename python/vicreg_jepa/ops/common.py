"""Types shared by the fused and the reference ops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import vicreg_kernels as vk
from vicreg_jepa.models.masks import Places
from vicreg_jepa.models.vit import Attend, Grid

# The weights of invariance, variance and covariance.
Weights = tuple[float, float, float]


@dataclass(frozen=True)
class Sequences:
    """Tokens of a batch of sequences of different lengths, and their places in the grid.

    places: the places of each sequence, on the host, if they were taken from a grid. Fused: x
    [total, D], index [total], offsets [P + 1] on the host. Reference: x [P, L, D], index [P, L],
    keep bool [P, L], with padding at the end.
    """

    x: Tensor
    index: Tensor
    offsets: Tensor | None = None
    keep: Tensor | None = None
    order: Any = None
    places: Places | None = None

    def with_tokens(self, x: Tensor) -> Sequences:
        return replace(self, x=x)


def by_frame(apart: Grid | None, attend: Attend) -> Attend:
    """Attention on dense tokens [B, T, D] in which each frame is a separate sample."""
    if apart is None:
        return attend

    def frames(module: vk.MaskedAttention, x: Tensor) -> Tensor:
        plane = apart.frame.tokens
        return attend(module, x.reshape(-1, plane, x.shape[-1])).reshape(x.shape)

    return frames
