"""LeJEPA (Balestriero and LeCun, 2025, arXiv:2511.08544): views of an image agree with their mean,
and SIGReg pulls the embeddings of every view to an isotropic Gaussian. It has no teacher and no
predictor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vicreg_jepa.methods import drawing, networks
from vicreg_jepa.methods.base import MethodKind, register
from vicreg_jepa.methods.drawing import DrawView
from vicreg_jepa.methods.vicreg import EXPANDER, VICReg
from vicreg_jepa.ops.choose import Kernels

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config


class LeJEPA(VICReg):
    """loss = (1 - lambda) mean((z_v - mean_v z)^2) + lambda SIGReg.

    In training mode `step` counts the calls of the loss; the random directions depend on it.
    """

    step: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        expander: nn.Module,
        kernels: Kernels,
        augments: Sequence[DrawView],
        *,
        sigreg: float = 0.05,
        slices: int = 1024,
    ) -> None:
        super().__init__(encoder, expander, kernels, augments)
        self.sigreg, self.slices = sigreg, slices
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def loss(self, *views: Tensor, process_group: Any = None) -> Tensor:
        z = torch.stack(views)  # [V, N, D]
        invariance = (z - z.mean(dim=0)).square().mean()
        regular = self.kernels.sigreg(z, self.slices, int(self.step), process_group)
        return (1 - self.sigreg) * invariance + self.sigreg * regular

    def after_step(self) -> None:
        self.step += 1


def build(config: Config, kernels: Kernels, channels: int) -> LeJEPA:
    encoder, expander = networks.encoder_and_expander(config, kernels, channels)
    loss = config.loss
    terms: dict[str, Any] = {
        "sigreg": loss.sigreg,
        "slices": loss.slices,
    }
    return LeJEPA(encoder, expander, kernels, drawing.of(config, loss.views), **terms)


SETTINGS = ("loss.sigreg", "loss.slices", "loss.views", *EXPANDER, *drawing.SETTINGS)
register(MethodKind("lejepa", LeJEPA, build, "views", "images", SETTINGS))
