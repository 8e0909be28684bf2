"""VICReg (Bardes, Ponce and LeCun, 2022, arXiv:2105.04906): two views, one encoder and expander.

A method that learns from batch statistics has `views` (what is encoded), `forward` (a view's
embedding) and `loss` (of the whole batch's embeddings): the trainer can then encode a batch in
pieces, and on many ranks, without changing the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_jepa.ops.choose import Kernels

Augment = Callable[[Tensor, torch.Generator], Tensor]


class VICReg(nn.Module):
    """weights: invariance, variance, covariance."""

    def __init__(
        self,
        encoder: nn.Module,
        expander: nn.Module,
        kernels: Kernels,
        augment: Augment,
        *,
        weights: tuple[float, float, float] = (25.0, 25.0, 1.0),
        views: int = 2,
    ) -> None:
        super().__init__()
        self.encoder, self.expander = encoder, expander
        self.kernels, self.augment, self.weights, self.count = kernels, augment, weights, views

    def views(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(self.augment(images, generator) for _ in range(self.count))

    def forward(self, view: Tensor) -> Tensor:
        return self.expander(self.encoder(view))

    def loss(self, x: Tensor, y: Tensor, *, process_group: Any = None) -> Tensor:
        return self.kernels.vicreg(x, y, self.weights, process_group)

    def after_step(self) -> None:
        """There is no teacher."""

    def features(self, images: Tensor) -> Tensor:
        """[B, D], what a probe sees."""
        return self.encoder(images)
