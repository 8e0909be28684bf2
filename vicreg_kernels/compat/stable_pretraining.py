"""stable-pretraining's losses (rbalestr-lab/stable-pretraining 0.1.8, losses, methods/lejepa.py).

Where torch.distributed runs, all of them are losses of the batch of all ranks. `SlicedEppsPulley`
is what its authors meant: their own drops the result of the reduction over ranks (docs/sigreg.md).
Left out, because the library has no fused op for it: everything else of stable_pretraining.losses;
`EppsPulley`, whose statistics of single slices are never made here; `TeacherStudentWrapper`, which
holds the networks (`vicreg_kernels.EMA` does).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vicreg_kernels.barlow import barlow_twins_loss
from vicreg_kernels.compat import shared
from vicreg_kernels.sigreg import sigreg_loss
from vicreg_kernels.vicreg import variance_covariance, vicreg_loss

__all__ = ["BarlowTwinsLoss", "SlicedEppsPulley", "VCRegLoss", "VICRegLoss"]

# Where stable-pretraining defines each name.
HOMES = {
    "BarlowTwinsLoss": "stable_pretraining.losses.joint_embedding",
    "SlicedEppsPulley": "stable_pretraining.methods.lejepa",
    "VCRegLoss": "stable_pretraining.losses.utils",
    "VICRegLoss": "stable_pretraining.losses.joint_embedding",
}


class VCRegLoss(nn.Module):
    """The weighted terms of `vicreg_kernels.variance_covariance`, with half the hinge.

    Args:
        std_coeff, cov_coeff: weights of variance and covariance.
        epsilon: added to the variance under the root.

    Shapes: z_i: [N, D], N >= 2 -> scalar of its dtype (float32 under autocast).
    """

    def __init__(self, std_coeff: float = 25, cov_coeff: float = 1, epsilon: float = 1e-4) -> None:
        super().__init__()
        self.std_coeff = std_coeff
        self.cov_coeff = cov_coeff
        self.epsilon = epsilon

    def forward(self, z_i: Tensor) -> Tensor:
        with shared.renamed(z="z_i", eps="epsilon"):
            variance, covariance = variance_covariance(
                z_i, eps=self.epsilon, process_group=shared.ranks()
            )
        return shared.rounded(0.5 * self.std_coeff * variance + self.cov_coeff * covariance, z_i)


class VICRegLoss(nn.Module):
    """`vicreg_kernels.vicreg_loss` with stable-pretraining's arguments.

    Args:
        sim_coeff, std_coeff, cov_coeff: weights of invariance, variance and covariance.
        epsilon: added to the variance under the root.

    The last three are read from the part `vcreg_loss`, where stable-pretraining keeps them.

    Shapes: z_i, z_j: [N, D], N >= 2 -> scalar of their dtype (float32 under autocast).
    """

    def __init__(
        self,
        sim_coeff: float = 25,
        std_coeff: float = 25,
        cov_coeff: float = 1,
        epsilon: float = 1e-4,
    ) -> None:
        super().__init__()
        self.sim_coeff = sim_coeff
        self.vcreg_loss = VCRegLoss(std_coeff, cov_coeff, epsilon)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        with shared.renamed(
            x="z_i",
            y="z_j",
            eps="epsilon",
            invariance_weight="sim_coeff",
            variance_weight="std_coeff",
            covariance_weight="cov_coeff",
        ):
            loss = vicreg_loss(
                z_i,
                z_j,
                invariance_weight=self.sim_coeff,
                variance_weight=self.vcreg_loss.std_coeff,
                covariance_weight=self.vcreg_loss.cov_coeff,
                eps=self.vcreg_loss.epsilon,
                convention="stable_pretraining",
                process_group=shared.ranks(),
            )
        return shared.rounded(loss, z_i)


class BarlowTwinsLoss(nn.Module):
    """`vicreg_kernels.barlow_twins_loss` with stable-pretraining's arguments.

    Args:
        lambd: weight of the off-diagonal sum.

    Shapes: z_i, z_j: [N, D], N >= 2 -> scalar of their dtype (float32 under autocast).
    """

    def __init__(self, lambd: float = 5e-3) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        with shared.renamed(x="z_i", y="z_j"):
            loss = barlow_twins_loss(
                z_i,
                z_j,
                lambd=self.lambd,
                convention="stable_pretraining",
                process_group=shared.ranks(),
            )
        return shared.rounded(loss, z_i)


class SlicedEppsPulley(nn.Module):
    """`vicreg_kernels.sigreg_loss` with stable-pretraining's arguments, directions and state.

    The directions are drawn from a generator seeded by the count `global_step`, rank 0's on every
    rank, which every call raises by one.

    Args:
        num_slices: number of random directions.
        t_max, n_points: an odd number of equally spaced knots on [0, t_max]; AssertionError for an
            even one, as stable-pretraining's.

    Shapes: x: [N, D], N >= 2 -> scalar, float32 (float64 for float64).
    """

    global_step: Tensor

    def __init__(self, num_slices: int = 1024, t_max: float = 3.0, n_points: int = 17) -> None:
        super().__init__()
        if n_points % 2 != 1:
            raise AssertionError(f"n_points: got {n_points}, takes an odd number")
        self.num_slices = num_slices
        self.t_max = t_max
        self.n_points = n_points
        self.ep = nn.Module()
        shared.register_quadrature(self.ep, n_points, t_max)
        self.register_buffer("global_step", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        step = self.global_step.clone()
        if shared.ranks():
            dist.broadcast(step, src=0)
        generator = torch.Generator(device=x.device).manual_seed(int(step))
        directions = shared.unit_columns(
            x.shape[-1], self.num_slices, x.device, torch.float32, generator
        )
        self.global_step.add_(1)
        with shared.renamed(z="x", knots="n_points"):
            return sigreg_loss(
                x,
                knots=self.n_points,
                t_max=self.t_max,
                convention="stable_pretraining",
                directions=directions,
                process_group=shared.ranks(),
            )
