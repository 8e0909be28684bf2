"""solo-learn's loss functions and momentum update (vturrisi/solo-learn, import name `solo`).

Where torch.distributed runs, both losses are those of the batch of all ranks, as in solo-learn from
version 1.0.6 on. Left out, because the library has no fused op for it: everything else of
solo.losses; `initialize_momentum_params`, which copies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vicreg_kernels.barlow import barlow_twins_loss
from vicreg_kernels.compat import shared
from vicreg_kernels.ema import ema_update_
from vicreg_kernels.vicreg import vicreg_loss

__all__ = ["MomentumUpdater", "barlow_loss_func", "vicreg_loss_func"]

# Where solo-learn defines each name.
HOMES = {
    "MomentumUpdater": "solo.utils.momentum",
    "barlow_loss_func": "solo.losses.barlow",
    "vicreg_loss_func": "solo.losses.vicreg",
}


def vicreg_loss_func(
    z1: Tensor,
    z2: Tensor,
    sim_loss_weight: float = 25.0,
    var_loss_weight: float = 25.0,
    cov_loss_weight: float = 1.0,
) -> Tensor:
    """`vicreg_kernels.vicreg_loss` with solo-learn's arguments.

    Args:
        z1, z2: the two views' projections, [N, D], N >= 2.
        sim_loss_weight, var_loss_weight, cov_loss_weight: of invariance, variance, covariance.

    Returns: a scalar of their dtype (float32 under autocast).

    Raises: ValueError and TypeError naming the argument.
    """
    with shared.renamed(
        x="z1",
        y="z2",
        invariance_weight="sim_loss_weight",
        variance_weight="var_loss_weight",
        covariance_weight="cov_loss_weight",
    ):
        loss = vicreg_loss(
            z1,
            z2,
            invariance_weight=sim_loss_weight,
            variance_weight=var_loss_weight,
            covariance_weight=cov_loss_weight,
            convention="solo_learn",
            process_group=shared.ranks(),
        )
    return shared.rounded(loss, z1)


def barlow_loss_func(
    z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025
) -> Tensor:
    """`vicreg_kernels.barlow_twins_loss` with solo-learn's arguments.

    Args:
        z1, z2: the two views' projections, [N, D], N >= 2.
        lamb: weight of the off-diagonal sum.
        scale_loss: factor on the loss.

    Returns: a scalar of their dtype (float32 under autocast).

    Raises: ValueError and TypeError naming the argument.
    """
    with shared.renamed(x="z1", y="z2", lambd="lamb"):
        # The convention "solo_learn" is this one with the factor in it.
        loss = barlow_twins_loss(
            z1, z2, lambd=lamb, convention="lightly", process_group=shared.ranks()
        )
    return shared.rounded(scale_loss * loss, z1)


class MomentumUpdater:
    """A momentum of cosine schedule, and the update of a network's parameters in one pass.

    Args:
        base_tau, final_tau: the momentum at the first and after the last step, 0 <= base_tau <=
            final_tau <= 1; AssertionError otherwise, as solo-learn's.
    """

    def __init__(self, base_tau: float = 0.996, final_tau: float = 1.0) -> None:
        super().__init__()
        if not 0 <= base_tau <= final_tau <= 1:
            raise AssertionError(
                f"base_tau: got {base_tau} with final_tau = {final_tau}, takes 0 <= base_tau <= "
                "final_tau <= 1"
            )
        self.base_tau = base_tau
        self.cur_tau = base_tau
        self.final_tau = final_tau

    @torch.no_grad()
    def update(self, online_net: nn.Module, momentum_net: nn.Module) -> None:
        """momentum_net's parameters <- cur_tau momentum_net + (1 - cur_tau) online_net."""
        with shared.renamed(targets="momentum_net", onlines="online_net", momentum="cur_tau"):
            ema_update_(
                list(momentum_net.parameters()), list(online_net.parameters()), self.cur_tau
            )

    def update_tau(self, cur_step: int, max_steps: int) -> None:
        """Set cur_tau to its value at cur_step of max_steps."""
        wave = (1.0 + math.cos(math.pi * cur_step / max_steps)) / 2.0
        self.cur_tau = self.final_tau - (self.final_tau - self.base_tau) * wave
