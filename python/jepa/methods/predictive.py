"""What the methods that predict hidden tokens share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jepa import masks
from jepa.kernels import Kernels, encode, predict
from jepa.vit import Grid, Predictor, ViT

# (grid, batch, a CPU generator) -> the masks of a step's whole batch
Draw = Callable[[Grid, int, torch.Generator], masks.Masks]


class Predictive(nn.Module):
    """Predicts the embeddings of hidden tokens from the seen ones'.

    kind: of loss; normalise: whether targets are layer-normed; `targets` is what is predicted.
    """

    kind = "l1"
    normalise = True

    def __init__(self, encoder: ViT, predictor: Predictor, kernels: Kernels, draw: Draw) -> None:
        super().__init__()
        self.encoder, self.predictor, self.kernels = encoder, predictor, kernels
        self.masks = draw

    def draw(self, batch: int, generator: torch.Generator) -> masks.Masks:
        """Of a step's whole batch; generator: a CPU one."""
        return self.masks(self.encoder.grid, batch, generator)

    def targets(self, x: Tensor) -> Tensor:
        """[B, T, D] of images or clips, without a gradient."""
        raise NotImplementedError

    def forward(self, x: Tensor, drawn: masks.Masks) -> Tensor:
        """x [B, C, H, W] or [B, C, F, H, W] -> the loss, the mean over what is predicted."""
        wanted = self.targets(x)
        context = encode(self.encoder, self.kernels, x, drawn.context)
        predicted = predict(self.predictor, self.kernels, context, drawn)
        return self.kernels.prediction_loss(
            predicted, wanted, drawn.targets, self.kind, self.normalise
        )

    def after_step(self) -> None:
        """Without a teacher there is nothing to do."""
