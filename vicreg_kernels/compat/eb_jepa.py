"""eb_jepa's losses (facebookresearch/eb_jepa, losses.py).

Left out, because the library has no fused op for it: `HingeStdLoss`, `TemporalSimilarityLoss`,
`InverseDynamicsLoss`, and `VC_IDM_Sim_Regularizer`, which holds them: its covariance is this one
after `vicreg_kernels.patch("eb_jepa")`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vicreg_kernels.compat import shared
from vicreg_kernels.sigreg import sigreg_loss
from vicreg_kernels.vicreg import variance_covariance, vicreg_terms

__all__ = ["BCS", "CovarianceLoss", "VCLoss", "VICRegLoss"]

# Where eb_jepa defines each name.
HOMES = dict.fromkeys(__all__, "eb_jepa.losses")


def _variance_covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    with shared.renamed(z="x"):
        variance, covariance = variance_covariance(x, covariance_normalizer="d(d-1)")
    return shared.rounded(variance, x), shared.rounded(covariance, x)


class VICRegLoss(nn.Module):
    """`vicreg_kernels.vicreg_terms` with eb_jepa's arguments.

    Args:
        std_coeff, cov_coeff: weights of variance and covariance; the invariance has 1.

    Shapes: z1, z2: [N, D], N >= 2, D >= 2 -> a dict of scalars "loss", "invariance_loss",
    "var_loss" and "cov_loss" of their dtype (float32 under autocast). Each rank has the loss of its
    own rows.
    """

    def __init__(self, std_coeff: float = 1.0, cov_coeff: float = 1.0) -> None:
        super().__init__()
        self.std_coeff = std_coeff
        self.cov_coeff = cov_coeff

    def forward(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        with shared.renamed(
            x="z1", y="z2", variance_weight="std_coeff", covariance_weight="cov_coeff"
        ):
            terms = vicreg_terms(
                z1,
                z2,
                invariance_weight=1.0,
                variance_weight=self.std_coeff,
                covariance_weight=self.cov_coeff,
                convention="eb_jepa",
            )
        names = ("loss", "invariance_loss", "var_loss", "cov_loss")
        return {name: shared.rounded(term, z1) for name, term in zip(names, terms, strict=True)}


class CovarianceLoss(nn.Module):
    """The mean square of the covariance off its diagonal.

    Shapes: x: [N, D], N >= 2, D >= 2 -> scalar of its dtype (float32 under autocast).
    """

    def forward(self, x: Tensor) -> Tensor:
        return _variance_covariance(x)[1]


class VCLoss(nn.Module):
    """Variance and covariance of the channels, every place and time a sample.

    Args:
        std_coeff, cov_coeff: weights of variance and covariance.
        proj: a module between, rows [B T H W, C] -> [B T H W, C']; None for none.

    Shapes: x: [B, C, T, H, W] (or [B, C, ...]) -> (loss, the two terms' sum, a dict of the floats
    "std_loss" and "cov_loss"). Actions are not read.
    """

    def __init__(self, std_coeff: float, cov_coeff: float, proj: nn.Module | None = None) -> None:
        super().__init__()
        self.std_coeff = std_coeff
        self.cov_coeff = cov_coeff
        self.proj = nn.Identity() if proj is None else proj

    def forward(
        self, x: Tensor, actions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        rows = self.proj(x.movedim(1, -1).flatten(0, -2))
        variance, covariance = _variance_covariance(rows)
        loss = self.std_coeff * variance + self.cov_coeff * covariance
        values = {"std_loss": variance.item(), "cov_loss": covariance.item()}
        return loss, variance + covariance, values


class BCS(nn.Module):
    """Mean squared distance of two views, and SIGReg of each, with eb_jepa's directions.

    The directions are drawn from a generator seeded by the count `step`, which every call raises by
    one. Where torch.distributed runs, SIGReg is that of the rows of all ranks and the distance that
    of this rank's.

    Args:
        num_slices: number of random directions.
        lmbd: weight of SIGReg.

    Shapes: z1, z2: [N, D], N >= 2 -> a dict of scalars "loss", "bcs_loss" and "invariance_loss",
    float32 (float64 for float64).
    """

    def __init__(self, num_slices: int = 256, lmbd: float = 10.0) -> None:
        super().__init__()
        self.num_slices = num_slices
        self.step = 0
        self.lmbd = lmbd

    def forward(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        if z1.shape != z2.shape:
            raise ValueError(f"z2: got shape {tuple(z2.shape)}, takes z1's, {tuple(z1.shape)}")
        generator = torch.Generator(device=z1.device).manual_seed(self.step)
        directions = shared.unit_columns(
            z1.shape[-1], self.num_slices, z1.device, torch.float32, generator
        )
        self.step += 1
        with shared.renamed(z="z1"):
            bcs = sigreg_loss(
                torch.stack((z1, z2)),
                convention="eb_jepa",
                directions=directions,
                process_group=shared.ranks(),
            )
        invariance = shared.mean_square(z1 - z2)
        return {
            "loss": invariance + self.lmbd * bcs,
            "bcs_loss": bcs,
            "invariance_loss": invariance,
        }
