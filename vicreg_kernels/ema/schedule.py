"""The momentum as a function of the step, on the host or in device memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vicreg_kernels.ema.checks import check_momentum

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A momentum that moves from `start` at step 0 to `final` at step `total` and stays there.

    linear: start + (final - start) step / total, as in I-JEPA and V-JEPA; cosine:
    final + (start - final) (1 + cos(pi step / total)) / 2, as in BYOL and DINO.
    """

    kind: str
    start: float
    final: float
    total: int | None

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule: got {self.kind!r}, takes one of {SCHEDULES}")
        check_momentum("momentum", self.start)
        check_momentum("final_momentum", self.final)
        if self.kind != "constant" and (self.total is None or self.total < 1):
            raise ValueError(
                f"total_steps: got {self.total}, takes an integer >= 1 with schedule={self.kind!r}"
            )

    def at(self, step: int) -> float:
        if self.kind == "constant" or self.total is None:
            return self.start
        part = min(step / self.total, 1.0)
        if self.kind == "linear":
            value = self.start + (self.final - self.start) * part
        else:
            value = self.final + (self.start - self.final) * (1.0 + math.cos(math.pi * part)) / 2.0
        return min(max(value, 0.0), 1.0)

    def at_tensor(self, step: Tensor) -> Tensor:
        """step: 0-d int64 -> 0-d float64 on the same device; no synchronisation."""
        if self.kind == "constant" or self.total is None:
            return torch.full_like(step, self.start, dtype=torch.float64)
        part = (step.double() / self.total).clamp(max=1.0)
        if self.kind == "linear":
            value = self.start + (self.final - self.start) * part
        else:
            wave = (1.0 + torch.cos(math.pi * part)) / 2.0
            value = self.final + (self.start - self.final) * wave
        return value.clamp(0.0, 1.0)
