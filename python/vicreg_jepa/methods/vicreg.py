"""VICReg (Bardes, Ponce and LeCun, 2022, arXiv:2105.04906): two views, one encoder and expander."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vicreg_jepa.methods import drawing, networks
from vicreg_jepa.methods.base import MethodKind, register
from vicreg_jepa.methods.drawing import DrawView
from vicreg_jepa.ops.choose import Kernels

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config

WEIGHTS = ("loss.invariance", "loss.variance", "loss.covariance")
EXPANDER = ("model.expander", "model.activation")


class VICReg(nn.Module):
    """augments: draw one view each; weights: invariance, variance, covariance."""

    def __init__(
        self,
        encoder: nn.Module,
        expander: nn.Module,
        kernels: Kernels,
        augments: Sequence[DrawView],
        *,
        weights: tuple[float, float, float] = (25.0, 25.0, 1.0),
    ) -> None:
        super().__init__()
        self.encoder, self.expander = encoder, expander
        self.kernels, self.augments, self.weights = kernels, augments, weights

    def views(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(augment(images, generator) for augment in self.augments)

    def forward(self, view: Tensor) -> Tensor:
        return self.expander(self.encoder(view))

    def loss(self, x: Tensor, y: Tensor, *, process_group: Any = None) -> Tensor:
        return self.kernels.vicreg(x, y, self.weights, process_group)

    def after_step(self) -> None:
        """Does nothing: there is no teacher."""

    def features(self, images: Tensor) -> Tensor:
        """[B, D], the input of a probe."""
        return self.encoder(images)

    def exported(self) -> tuple[str, nn.Module]:
        return "encoder", self.encoder


def weights(config: Config) -> tuple[float, float, float]:
    loss = config.loss
    return loss.invariance, loss.variance, loss.covariance


def build(config: Config, kernels: Kernels, channels: int) -> VICReg:
    encoder, expander = networks.encoder_and_expander(config, kernels, channels)
    return VICReg(encoder, expander, kernels, drawing.of(config, 2), weights=weights(config))


SETTINGS = (*WEIGHTS, *EXPANDER, *drawing.SETTINGS)
register(MethodKind("vicreg", VICReg, build, "views", "images", SETTINGS))
