"""What the ranks of a SIGReg loss exchange: their agreement, and sums.

Statistics are sums over rows, so all that is exchanged is the 2 G K M sums of cosines and sines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.sigreg.contract import Settings

OP = "sigreg_loss"

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_LIBRARY.define("sigreg_sum_ranks(Tensor value, str group) -> Tensor")


@torch.library.impl(_LIBRARY, "sigreg_sum_ranks", "CompositeExplicitAutograd")
def _sum_ranks(value: Tensor, group: str) -> Tensor:
    return distributed.sum_ranks_(OP, distributed.by_name(group), value.clone())


@torch.library.register_fake("vicreg_kernels::sigreg_sum_ranks")
def _sum_ranks_fake(value: Tensor, group: str) -> Tensor:
    return torch.empty_like(value)


def mean_over_ranks(values: Tensor, group: str) -> Tensor:
    """The mean over the values of all ranks; its gradient is times the number of ranks."""
    total = values.sum()
    wide = total.detach().double()
    mine = torch.stack((wide, torch.full_like(wide, values.numel()), torch.ones_like(wide)))
    summed, count, ranks = torch.ops.vicreg_kernels.sigreg_sum_ranks(mine, group).unbind()
    own = (ranks / count).to(total.dtype) * total
    return own + ((summed / count).to(total.dtype) - own.detach())


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
