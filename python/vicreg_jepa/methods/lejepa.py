"""LeJEPA (Balestriero and LeCun, 2025, arXiv:2511.08544): views of an image agree with their mean,
and SIGReg holds every view's embeddings to an isotropic Gaussian. No teacher, no predictor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vicreg_jepa.methods.vicreg import Augment, VICReg
from vicreg_jepa.ops.choose import Kernels


class LeJEPA(VICReg):
    """loss = (1 - lambda) mean((z_v - mean_v z)^2) + lambda SIGReg.

    `step` counts the losses, and with it the random directions, in training mode.
    """

    step: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        expander: nn.Module,
        kernels: Kernels,
        augment: Augment,
        *,
        sigreg: float = 0.05,
        slices: int = 1024,
        views: int = 2,
    ) -> None:
        super().__init__(encoder, expander, kernels, augment, views=views)
        self.sigreg, self.slices = sigreg, slices
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def loss(self, *views: Tensor, process_group: Any = None) -> Tensor:
        z = torch.stack(views)  # [V, N, D]
        invariance = (z - z.mean(dim=0)).square().mean()
        regular = self.kernels.sigreg(z, self.slices, int(self.step), process_group)
        return (1 - self.sigreg) * invariance + self.sigreg * regular

    def after_step(self) -> None:
        self.step += 1
