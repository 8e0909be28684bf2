"""Energies of counted steps: a distance that respects walls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vicreg_jepa.models.landmarks import Landmarks
from vicreg_jepa.planning import checks
from vicreg_jepa.planning.energies import Energy


@dataclass(frozen=True)
class Steps(Energy):
    """The counted steps from the latents of a path to the goal's latents [B, D].

    at: "sum" over the horizon, or at its "end".
    """

    landmarks: Landmarks
    goal: Tensor
    at: str = "end"

    def __post_init__(self) -> None:
        checks.choice("at", self.at, ("sum", "end"))
        checks.shaped("goal", self.goal, None, None)

    def __call__(self, path: Tensor, actions: Tensor) -> Tensor:
        if self.at == "end":
            path = path[:, :, -1:]
        here, off = self.landmarks.nearest(path)
        there, _ = self.landmarks.nearest(self.goal)
        return (off + self.landmarks.steps[here, there[:, None, None]]).sum(dim=2)

    def rows(self, which: Tensor) -> Steps:
        return Steps(self.landmarks, self.goal[which], self.at)


@dataclass(frozen=True)
class Reach(Energy):
    """0 for a path whose every latent is at most `most` counted steps from the one before it, the
    first from `start` [B, D], and infinite for all others: what the level below cannot reach is no
    candidate.
    """

    landmarks: Landmarks
    start: Tensor
    most: float

    def __post_init__(self) -> None:
        checks.shaped("start", self.start, None, None)
        checks.number("most", self.most, open_low=True)

    def __call__(self, path: Tensor, actions: Tensor) -> Tensor:
        there, off = self.landmarks.nearest(path)
        first = self.landmarks.nearest(self.start)[0][:, None, None].expand_as(there[..., :1])
        here = torch.cat([first, there[..., :-1]], dim=2)
        near = off + self.landmarks.steps[here, there] <= self.most
        return torch.where(near.all(dim=2), 0.0, torch.inf)

    def rows(self, which: Tensor) -> Reach:
        return Reach(self.landmarks, self.start[which], self.most)
