"""stable-worldmodel's SIGReg (rbalestr-lab/stable-worldmodel 0.1.1, wm/loss.py).

Left out, because the library has no fused op for it: `PLDMLoss`, `TemporalStraighteningLoss` and
`VCReg`, whose covariance over time is of values that are not centred over time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vicreg_kernels.compat import shared
from vicreg_kernels.sigreg import sigreg_loss

__all__ = ["SIGReg"]

# Where stable-worldmodel defines each name.
HOMES = {"SIGReg": "stable_worldmodel.wm.loss"}


class SIGReg(nn.Module):
    """`vicreg_kernels.sigreg_loss` with stable-worldmodel's arguments, directions and state.

    The directions are drawn from torch's generator, as stable-worldmodel draws them. Under
    torch.distributed the statistic is that of this rank's rows, as there.

    Args:
        knots: equally spaced knots on [0, 3].
        num_proj: number of random directions.

    Shapes: proj: [T, B, D], a statistic a time step, or [B, D]; B >= 2 -> scalar, float32 (float64
    for float64).
    """

    def __init__(self, knots: int = 17, num_proj: int = 1024) -> None:
        super().__init__()
        self.knots = knots
        self.num_proj = num_proj
        shared.register_quadrature(self, knots, 3.0)

    def forward(self, proj: Tensor) -> Tensor:
        with shared.renamed(z="proj"):
            z = shared.grouped(proj)
            directions = shared.unit_columns(z.shape[-1], self.num_proj, z.device, torch.float32)
            return sigreg_loss(z, knots=self.knots, convention="lewm", directions=directions)
