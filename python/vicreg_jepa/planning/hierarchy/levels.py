"""Models of macro-actions that need no training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vicreg_jepa.planning import checks
from vicreg_jepa.planning.model import LatentModel


@dataclass(frozen=True)
class Held:
    """Macro-actions that hold an action of a model for `steps` of its steps: a control of learned
    ones. A step of it costs as many of the model.
    """

    model: LatentModel
    steps: int

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, 1)

    @property
    def actions(self) -> int:
        return self.model.actions

    def encode(self, frames: Tensor) -> Tensor:
        return self.model.encode(frames)

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        every = actions.repeat_interleave(self.steps, dim=2)
        return self.model.rollout(start, every)[:, :, self.steps - 1 :: self.steps]
