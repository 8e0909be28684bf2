"""Batch norm over the rows of all ranks, so that many processes train the same as one.

torch.nn.SyncBatchNorm runs only on GPUs; this one does the same on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOfRanks(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _SumOfRanks.apply(grad)


class CPUSyncBatchNorm(_BatchNorm):
    """BatchNorm1d and 2d whose training statistics are those of the rows of all ranks.

    Its parameters and buffers have the same names, so checkpoints are interchangeable.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"x: got {x.dim()} dimensions, takes at least 2")

    # torch.compile breaks its graph here, because of the collective inside.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        along = [d for d in range(x.dim()) if d != 1]
        wide = x.double()  # as in torch's own: the sum of squares then loses no digits
        rows = wide.new_tensor([x.numel() / x.shape[1]])
        total = _SumOfRanks.apply(torch.cat((wide.sum(along), wide.square().sum(along), rows)))
        count = total[-1].detach()
        if count < 2:
            raise ValueError(
                f"x: got {int(count)} values per channel on all ranks, takes at least 2"
            )
        mean, square = (total[:-1] / count).chunk(2)
        variance = (square - mean.square()).clamp(min=0.0)
        self._follow(mean.detach(), variance.detach() * count / (count - 1))
        scale = (variance + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        return torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def synchronised(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace each BatchNorm1d, 2d and 3d in module by one over all ranks, with the same parameters
    and buffers.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        if not (module.affine and module.track_running_stats):
            raise ValueError("batch norm: takes affine=True and track_running_stats=True")
        norm = CPUSyncBatchNorm(module.num_features, module.eps, module.momentum)
        norm._parameters, norm._buffers = module._parameters, module._buffers
        return norm.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, synchronised(child, device))
    return module
