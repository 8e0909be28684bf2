"""stable-worldmodel's SIGReg (rbalestr-lab/stable-worldmodel 0.1.1, wm/loss.py).

Left out, because the library has no fused op for it: `PLDMLoss`, `TemporalStraighteningLoss` and
`VCReg`, whose covariance over time is of values that are not centred over time.
"""

from __future__ import annotations

import torch

from vicreg_kernels.compat import shared

__all__ = ["SIGReg"]

# Where stable-worldmodel defines each name.
HOMES = {"SIGReg": "stable_worldmodel.wm.loss"}


class SIGReg(shared.LeWMSIGReg):
    __doc__ = shared.LeWMSIGReg.__doc__

    drawn = torch.float32
