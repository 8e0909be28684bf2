"""A method's features of images or clips."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vicreg_jepa.distributed import sharding


@torch.no_grad()
def features(method: nn.Module, samples: Tensor, batch: int = 256) -> Tensor:
    """Compute features [N, D] on the CPU, in evaluation mode; the former mode is restored."""
    was, device = method.training, next(method.parameters()).device
    method.eval()
    try:
        return torch.cat(
            [method.features(part.to(device)).float().cpu() for part in samples.split(batch)]
        )
    finally:
        method.train(was)
        if sharding.is_sharded(method):
            method.reshard()  # a backward pass would do this
