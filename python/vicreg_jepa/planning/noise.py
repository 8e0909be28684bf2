"""The random numbers of planners. A number depends on the seed and the time of its environment, and
never on the batch: an environment has the same plan alone and beside others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vicreg_jepa.worlds import draws
from vicreg_jepa.worlds.draws import Stream

ROUNDS = 1 << 20  # more than the iterations of any plan


@dataclass(frozen=True)
class Draws:
    """seed, time: int64 [B]."""

    seed: Tensor
    time: Tensor

    def rows(self, which: Tensor) -> Draws:
        return Draws(self.seed[which], self.time[which])

    def uniform(self, iteration: int, *shape: int) -> Tensor:
        """float32 [B, *shape] in [2**-25, 1 - 2**-25]."""
        time = self.time * ROUNDS + iteration
        u = draws.uniform(self.seed, Stream.PLAN, time, math.prod(shape))
        return (u + 2.0**-25).clamp(max=1 - 2.0**-24).view(len(u), *shape)

    def normal(self, iteration: int, *shape: int) -> Tensor:
        """float32 [B, *shape], standard normal, by the inverse of its distribution function."""
        return math.sqrt(2) * torch.erfinv(2 * self.uniform(iteration, *shape) - 1)


@cache  # without a bound: a CUDA graph (captured.py) reads the matrix after this call
def coloured(horizon: int, colour: float, device: torch.device) -> Tensor:
    """[H, H]: the matrix M for which white @ M, of white noise [..., H], has a power spectrum
    proportional to 1 / f**colour and unit variance. Colour 0 is white noise; the frequency 0
    has the power of the lowest other one.
    """
    frequency = torch.fft.rfftfreq(horizon, dtype=torch.float64).clamp(min=1 / horizon)
    rows = torch.fft.rfft(torch.eye(horizon, dtype=torch.float64), dim=1)
    matrix = torch.fft.irfft(rows * frequency ** (-colour / 2), n=horizon, dim=1)
    return (matrix / matrix[:, 0].norm()).float().to(device)
