"""What the ranks of a SIGReg loss exchange: their agreement, and sums.

Statistics are sums over rows, so all that is exchanged is the 2 G K M sums of cosines and sines.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.sigreg.contract import Settings

OP = "sigreg_loss"


def agree(group: Any, z: Tensor, directions: Tensor, settings: Settings) -> list[int]:
    """The rows of each rank, once all are about to compute the same statistic."""
    knots = settings.knots
    facts = {
        "z": f"[{z.shape[0]}, N, {z.shape[2]}] {z.dtype}",
        "slices": directions.shape[1],
        "knots": f"{len(knots)} up to {knots[-1]:.6g}",
        "convention": f"weights {sum(settings.weights):.9g}, times rows {settings.times_rows}",
        "seed and step": list(settings.drawn),
    }
    return distributed.agree(group, OP, z.shape[1], facts)
