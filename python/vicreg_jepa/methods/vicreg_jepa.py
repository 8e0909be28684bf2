"""A joint-embedding predictor without a teacher: the embedding of each view is predicted from that
of the other, and VICReg's variance and covariance keep both from collapsing (LeCun, 2022, "A path
towards autonomous machine intelligence", section 4.5; the terms are VICReg's).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vicreg_jepa.methods import drawing, networks
from vicreg_jepa.methods.base import MethodKind, register
from vicreg_jepa.methods.drawing import DrawView
from vicreg_jepa.methods.vicreg import EXPANDER, WEIGHTS, VICReg, weights
from vicreg_jepa.models.perceptron import mlp
from vicreg_jepa.ops.choose import Kernels

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config


class VICRegJEPA(VICReg):
    """predictor: [N, D] -> [N, D]."""

    def __init__(
        self,
        encoder: nn.Module,
        expander: nn.Module,
        predictor: nn.Module,
        kernels: Kernels,
        augments: Sequence[DrawView],
        *,
        weights: tuple[float, float, float] = (25.0, 25.0, 1.0),
    ) -> None:
        super().__init__(encoder, expander, kernels, augments, weights=weights)
        self.predictor = predictor

    def forward(self, view: Tensor) -> Tensor:
        """[N, 2, D]: the view's embedding, and its prediction of the other view's."""
        z = super().forward(view)
        return torch.stack((z, self.predictor(z)), dim=1)

    def loss(self, x: Tensor, y: Tensor, *, process_group: Any = None) -> Tensor:
        """Each view predicts the other; variance and covariance of the embeddings as in VICReg."""
        (x, from_x), (y, from_y) = x.unbind(1), y.unbind(1)
        invariance = nn.functional.mse_loss(from_x, y) + nn.functional.mse_loss(from_y, x)
        loss = self.weights[0] / 2 * invariance
        for z in (x, y):
            variance, covariance = self.kernels.variance_covariance(z, process_group)
            loss = loss + self.weights[1] / 2 * variance + self.weights[2] * covariance
        return loss


def build(config: Config, kernels: Kernels, channels: int) -> VICRegJEPA:
    encoder, expander = networks.encoder_and_expander(config, kernels, channels)
    width = config.model.expander[1]
    predictor = mlp(width, config.model.predictor_dim, width)
    augments = drawing.of(config, 2)
    return VICRegJEPA(encoder, expander, predictor, kernels, augments, weights=weights(config))


SETTINGS = (*WEIGHTS, *EXPANDER, *drawing.SETTINGS, "model.predictor_dim")
register(MethodKind("vicreg_jepa", VICRegJEPA, build, "views", "images", SETTINGS))
