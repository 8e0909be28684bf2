"""Means over the values of all ranks, outside of an op's own sums."""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_kernels.distributed.collectives import sum_ranks_
from vicreg_kernels.distributed.groups import by_name

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_LIBRARY.define("sum_over_ranks(Tensor value, str op, str group) -> Tensor")


@torch.library.impl(_LIBRARY, "sum_over_ranks", "CompositeExplicitAutograd")
def _sum_over_ranks(value: Tensor, op: str, group: str) -> Tensor:
    return sum_ranks_(op, by_name(group), value.clone())


@torch.library.register_fake("vicreg_kernels::sum_over_ranks")
def _sum_over_ranks_fake(value: Tensor, op: str, group: str) -> Tensor:
    return torch.empty_like(value)


def mean_over_ranks(op: str, values: Tensor, group: str) -> Tensor:
    """The mean over the values of all ranks. Its gradient is multiplied by the number of ranks."""
    total = values.sum()
    wide = total.detach().double()
    mine = torch.stack((wide, torch.full_like(wide, values.numel()), torch.ones_like(wide)))
    summed, count, ranks = torch.ops.vicreg_kernels.sum_over_ranks(mine, op, group).unbind()
    own = (ranks / count).to(total.dtype) * total
    return own + ((summed / count).to(total.dtype) - own.detach())
