"""The base class of the methods that predict hidden tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vicreg_jepa.models import masks
from vicreg_jepa.models.vit import Grid, Predictor, ViT
from vicreg_jepa.ops.choose import Kernels
from vicreg_jepa.ops.encode import encode, predict

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config

PREDICTOR = (
    "model.predictor_dim",
    "model.predictor_depth",
    "model.predictor_heads",
    "training.checkpointing",
)
OF_VIDEO = ("model.sees", "loss.static_token_share", "loss.vc_weight")
# (grid, batch, a CPU generator) -> the masks of a step's whole batch
Draw = Callable[[Grid, int, torch.Generator], masks.Masks]


class Predictive(nn.Module, ABC):
    """Predicts `targets`, the embeddings of hidden tokens, from the embeddings of the visible ones.

    kind: the kind of loss; normalise: whether targets are layer-normed. static_token_share: the
    share of a clip's static tokens that are predicted; all changing tokens are. In a video of few
    moving things nearly every token is background, which is learned at once; published code
    predicts all, 1. vc_weight: weight of VICReg's variance and covariance (25 : 1) of the context's
    tokens. It keeps them from the low rank to which they fall with a teacher alone.
    """

    kind = "l1"
    normalise = True

    @property
    def contexts(self) -> tuple[int, ...]:
        """The context lengths of surprise, in frames: the published ones that are shorter than the
        clip.
        """
        frames, tubelet = self.encoder.grid.frames, self.encoder.patch_embed.size[0]
        return tuple(n for n in (2, 4, 6, 8, 10) if n % tubelet == 0 and n < frames * tubelet)

    def __init__(
        self,
        encoder: ViT,
        predictor: Predictor,
        kernels: Kernels,
        draw: Draw,
        *,
        static_token_share: float = 1.0,
        vc_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder, self.predictor, self.kernels = encoder, predictor, kernels
        self.masks = draw
        self.static_token_share, self.vc_weight = static_token_share, vc_weight

    def draw(self, x: Tensor, first: int, batch: int, generator: torch.Generator) -> masks.Masks:
        """Draw the masks of x, without the static target tokens that are left out."""
        end = first + len(x)
        drawn = self.masks(self.encoder.grid, batch, generator).part(first, end)
        if self.static_token_share == 1.0:
            return drawn
        chance = torch.rand(batch, self.encoder.grid.tokens, generator=generator)[first:end]
        changing = masks.changing(self.encoder.patch_embed.patches(x), self.encoder.grid).cpu()
        return masks.chosen(drawn, changing | (chance < self.static_token_share))

    @abstractmethod
    def targets(self, x: Tensor) -> Tensor:
        """[B, T, D] of images or clips, without a gradient."""

    @abstractmethod
    def tokens(self, x: Tensor) -> Tensor:
        """[B, T, D] of images or clips, the input of a probe of tokens."""

    def features(self, x: Tensor) -> Tensor:
        """[B, D], the mean of the tokens, the input of a probe."""
        return self.tokens(x).mean(dim=1)

    def forward(
        self, x: Tensor, drawn: masks.Masks, weight: float = 1.0, process_group: Any = None
    ) -> Tensor:
        """x [B, C, H, W] or [B, C, F, H, W] -> the loss: weight times the mean over the predicted
        tokens, plus variance and covariance of the context's tokens over all ranks of
        process_group.
        """
        targets = self.targets(x)
        context = encode(self.encoder, self.kernels, x, drawn.context)
        predicted = predict(self.predictor, self.kernels, context, drawn)
        loss = weight * self.kernels.prediction_loss(
            predicted, targets, drawn.targets, self.kind, self.normalise
        )
        return loss + self.variance_covariance(self.kernels.rows(context), process_group)

    def variance_covariance(self, tokens: Tensor, process_group: Any) -> Tensor | float:
        """The weighted sum of both terms of tokens [N, D]."""
        if self.vc_weight == 0:
            return 0.0
        variance, covariance = self.kernels.variance_covariance(tokens, process_group)
        return self.vc_weight * (variance + covariance / 25)

    def foreseen(self, x: Tensor, seen: Sequence[int]) -> list[Tensor]:
        """For each number of token frames seen, the prediction of the rest of the clips, [B, T',
        D].
        """
        parts = []
        for frames in seen:
            drawn = masks.future(self.encoder.grid, len(x), frames)
            context = encode(self.encoder, self.kernels, x, drawn.context)
            predicted = predict(self.predictor, self.kernels, context, drawn)
            parts.append(predicted.reshape(len(x), -1, predicted.shape[-1]))
        return parts

    def after_step(self) -> None:
        """Does nothing: there is no teacher."""

    def exported(self) -> tuple[str, nn.Module]:
        return "encoder", self.encoder


def video_loss(config: Config) -> dict[str, Any]:
    loss = config.loss
    return {"static_token_share": loss.static_token_share, "vc_weight": loss.vc_weight}
