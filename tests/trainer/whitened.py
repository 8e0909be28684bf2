"""A method from outside of the package, as a user writes one: docs/trainer.md has the steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vicreg_jepa.methods import networks
from vicreg_jepa.methods.augment import Augment
from vicreg_jepa.methods.base import MethodKind, register


class Whitened(nn.Module):
    """Two views agree, and each has the identity as its covariance."""

    def __init__(self, encoder: nn.Module, expander: nn.Module, weight: float) -> None:
        super().__init__()
        self.encoder, self.expander, self.weight = encoder, expander, weight
        self.augment = Augment()

    def views(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return self.augment(images, generator), self.augment(images, generator)

    def forward(self, view: Tensor) -> Tensor:
        return self.expander(self.encoder(view))

    def loss(self, x: Tensor, y: Tensor, *, process_group=None) -> Tensor:
        eye = torch.eye(x.shape[1])
        white = sum((z.T.cov() - eye).square().mean() for z in (x, y))
        return (x - y).square().mean() + self.weight * white

    def after_step(self) -> None:
        pass

    def features(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def exported(self) -> tuple[str, nn.Module]:
        return "encoder", self.encoder


def build(settings, kernels, channels) -> Whitened:
    parts = networks.encoder_and_expander(settings, kernels, channels)
    return Whitened(*parts, settings.loss.covariance)


TAKES = ("model.expander", "model.activation", "loss.covariance")
KIND = MethodKind(f"{__name__}.views", Whitened, build, "views", "images", TAKES)
register(KIND)
