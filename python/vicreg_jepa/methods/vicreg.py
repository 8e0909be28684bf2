"""VICReg (Bardes, Ponce and LeCun, 2022, arXiv:2105.04906): two views, one encoder and expander."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vicreg_jepa.methods import networks
from vicreg_jepa.methods.augment import Augment
from vicreg_jepa.methods.base import MethodKind, register
from vicreg_jepa.ops.choose import Kernels

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config

DrawView = Callable[[Tensor, torch.Generator], Tensor]
WEIGHTS = ("loss.invariance", "loss.variance", "loss.covariance")
EXPANDER = ("model.expander", "model.activation")


class VICReg(nn.Module):
    """weights: invariance, variance, covariance."""

    def __init__(
        self,
        encoder: nn.Module,
        expander: nn.Module,
        kernels: Kernels,
        augment: DrawView,
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
    return VICReg(encoder, expander, kernels, Augment(), weights=weights(config))


register(MethodKind("vicreg", VICReg, build, "views", "images", (*WEIGHTS, *EXPANDER)))
