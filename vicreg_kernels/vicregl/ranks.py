"""Means over the samples of all ranks.

Matching is a sample's own matter and the statistics are the VICReg op's, so all that is exchanged
here is one small vector of means, weighed by the rows of each rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.core import dispatch

OP = "vicregl"

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
# facts: what must be the same on every rank. -> the means, and rows times ranks over all rows.
_LIBRARY.define(
    "vicregl_ranks_mean(Tensor own, SymInt rows, str facts, str group) -> (Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "vicregl_ranks_mean", "CompositeExplicitAutograd")
def _ranks_mean(own: Tensor, rows: int, facts: str, name: str) -> tuple[Tensor, Tensor]:
    group = distributed.by_name(name)
    about = {"settings": facts, "dtype": own.dtype, "terms": own.numel()}
    counts = distributed.agree(group, OP, rows, about)
    total = distributed.sum_ranks_(OP, group, own.double() * rows) / sum(counts)
    share = own.new_full((), rows * len(counts) / sum(counts), dtype=torch.float64)
    return total.to(own.dtype), share


@torch.library.register_fake("vicreg_kernels::vicregl_ranks_mean")
def _ranks_mean_fake(own: Tensor, rows: int, facts: str, name: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(own), own.new_empty((), dtype=torch.float64)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: int, facts: str, name: str) -> Tensor:
        mean, share = torch.ops.vicreg_kernels.vicregl_ranks_mean(own, rows, facts, name)
        ctx.save_for_backward(share)
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (share,) = ctx.saved_tensors
        return grad * share.to(grad.dtype), None, None, None


def mean(own: Tensor, rows: int, facts: str, name: str) -> Tensor:
    """Turn means [K] over this rank's `rows` samples into means over all ranks' samples. The
    gradient is multiplied by the number of ranks, as in vicreg_kernels/distributed.
    """
    return _Mean.apply(own, rows, facts, name)


def choose(backend: str | None, like: Tensor) -> str:
    """The backend of the part that each rank computes by itself."""
    if distributed.choose_backend(backend, like.dtype) == "reference":
        return "reference"
    return dispatch.choose(OP, None, like.device.type, like.dtype)
