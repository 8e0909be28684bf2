"""Small networks that are fitted to samples in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def fit(
    network: nn.Module,
    loss: Callable[[Tensor], Tensor],
    count: int,
    *,
    steps: int,
    batch: int,
    rate: float,
    decay: float,
    generator: torch.Generator | None = None,
) -> None:
    """Fit a network by AdamW with a cosine schedule, to the loss of rows int64 [batch] that each
    step draws from `count` samples, with repetition. generator: of the rows; None: torch's.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        value = loss(torch.randint(count, (batch,), generator=generator))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        schedule.step()
