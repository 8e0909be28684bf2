"""pyjepa's losses and EMA (pyjepa 0.3.0, losses/ and optim/ema.py).

Left out, because the library has no fused op for it: `VarianceRegularizer`, `JEPALoss` and
`prediction_loss` of predictions and targets that are already picked and normalised
(`vicreg_kernels.prediction_loss` does both on the way).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vicreg_kernels.compat import shared
from vicreg_kernels.ema import ema_update_
from vicreg_kernels.vicreg import variance_covariance, vicreg_terms

__all__ = ["EMA", "SIGReg", "VICRegLoss"]

# Where pyjepa defines each name.
HOMES = {
    "EMA": "pyjepa.optim.ema",
    "SIGReg": "pyjepa.losses.sigreg",
    "VICRegLoss": "pyjepa.losses.vicreg",
}


class VICRegLoss(nn.Module):
    """`vicreg_kernels.vicreg_terms` with pyjepa's arguments: variance and covariance are means over
    the views, and positions are samples.

    Args:
        sim_coeff, std_coeff, cov_coeff: weights of invariance, variance and covariance.
        eps: added to the variance under the root.

    Shapes: x, y: [N, D] or [B, P, D], at least 2 rows -> a dict of scalars "loss", "loss_inv",
    "loss_var" and "loss_cov" of their dtype (float32 under autocast). Without y the invariance is a
    float32 0, and the loss is float32 for half inputs.
    """

    def __init__(
        self,
        sim_coeff: float = 25.0,
        std_coeff: float = 25.0,
        cov_coeff: float = 1.0,
        eps: float = 1e-4,
    ) -> None:
        super().__init__()
        self.sim_coeff = sim_coeff
        self.std_coeff = std_coeff
        self.cov_coeff = cov_coeff
        self.eps = eps

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        first = x.flatten(0, 1) if x.dim() == 3 else x
        if y is None:
            with shared.renamed(z="x"):
                variance, covariance = variance_covariance(first, eps=self.eps)
            return {
                "loss": self.std_coeff * variance + self.cov_coeff * covariance,
                "loss_inv": torch.zeros((), device=x.device),
                "loss_var": shared.rounded(variance, x),
                "loss_cov": shared.rounded(covariance, x),
            }
        with shared.renamed(
            invariance_weight="sim_coeff",
            variance_weight="std_coeff",
            covariance_weight="cov_coeff",
        ):
            terms = vicreg_terms(
                first,
                y.flatten(0, 1) if y.dim() == 3 else y,
                invariance_weight=self.sim_coeff,
                variance_weight=self.std_coeff,
                covariance_weight=self.cov_coeff,
                eps=self.eps,
                convention="vicregl",
            )
        names = ("loss", "loss_inv", "loss_var", "loss_cov")
        return {name: shared.rounded(term, x) for name, term in zip(names, terms, strict=True)}


class SIGReg(shared.LeWMSIGReg):
    __doc__ = shared.LeWMSIGReg.__doc__


class EMA:
    """The parameters of a target module follow an online one's, in one pass.

    Args:
        online, target: modules of the same parameters; the target's need no gradient from here on.
            Buffers are left alone.
        momentum_schedule: gives the momentum of each update; None: constant_momentum.
    """

    def __init__(
        self,
        online: nn.Module,
        target: nn.Module,
        momentum_schedule: Iterable[float] | None = None,
        constant_momentum: float = 0.996,
    ) -> None:
        self.online = online
        self.target = target
        self.schedule = None if momentum_schedule is None else iter(momentum_schedule)
        self.constant = constant_momentum
        self.target.requires_grad_(False)

    @torch.no_grad()
    def update(self) -> float:
        """Update the target; return the momentum."""
        momentum = self.constant if self.schedule is None else next(self.schedule)
        with shared.renamed(targets="target", onlines="online"):
            ema_update_(list(self.target.parameters()), list(self.online.parameters()), momentum)
        return momentum
