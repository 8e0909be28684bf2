"""An agent of all parts: that of `recall`, which is also surprised. Any part can be left out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicreg_jepa.recall.agent import Agent, Mind
from vicreg_jepa.recall.graph import Floats
from vicreg_jepa.worlds.world import SPEED, State, towards


@dataclass(frozen=True)
class Parts:
    """The parts that the system has. Without `memory` it knows this visit alone; without `surprise`
    it never doubts where it is; without `levels` it plans straight to the goal's place, once it
    knows that; without `planning` it walks straight at the subgoal; without `shield` what it wants
    is executed.
    """

    memory: bool = True
    surprise: bool = True
    levels: bool = True
    planning: bool = True
    shield: bool = True


@dataclass(frozen=True)
class Push:
    """The dot is put elsewhere, which it does not feel: in step `step`, to `places` [N, 2]."""

    step: int
    places: Tensor


class System(Agent):
    """The agent in N environments at once; see Agent.

    parts: those that it has. alarm: a step surprises whose latents are farther from the predicted
    ones than this. The agent then takes itself to be somewhere else than it thought: it keeps what
    it remembered before this visit, forgets what it saw on it, whose places would be wrong, and
    looks for where it is. push: what is done to the dot.

    alarms: bool [N], whether the last step surprised.
    """

    def __init__(
        self, *arguments: Any, parts: Parts, alarm: float, push: Push | None = None, **words: Any
    ) -> None:
        super().__init__(*arguments, **words)
        self.parts, self.alarm, self.push = parts, alarm, push
        self.alarms = torch.zeros(len(self.minds), dtype=torch.bool)
        self._known = [(mind.rows, mind.recalled) for mind in self.minds]

    def disturbed(self, state: State) -> State:
        if self.push is None or self.step + 1 != self.push.step:
            return state
        return self.world.at(state, self.push.places)

    def led(self, action: Tensor, active: Tensor) -> State:
        state = super().led(action, active)
        self.alarms = (self.surprise > self.alarm) & active
        if self.parts.surprise:
            for number in self.alarms.nonzero()[:, 0].tolist():
                self._lose_the_place(number)
        return state

    def _lose_the_place(self, number: int) -> None:
        rows, recalled = self._known[number]
        offset = np.zeros(2) if rows is None else None  # without rows its own frame is the only one
        trail: deque[tuple[int, Floats]] = deque(maxlen=self.span)
        self.minds[number] = Mind(rows, trail, recalled=recalled, offset=offset)
        self.own[number], self.goals[number] = 0.0, np.nan
        self.former[number], self.coming[number] = 0.0, 0.0  # it stands until its next plan
        self._note_in(number)

    def _subgoal(self, number: int, target: Floats | None) -> Floats:
        if target is None or self.parts.levels:
            return super()._subgoal(number, target)
        return target

    def _to_subgoals(self, numbers: list[int], start: Tensor) -> Tensor:
        if self.parts.planning:
            return super()._to_subgoals(numbers, start)
        here, to, actions = start[:, :2], self.subgoals[numbers].to(start), []
        for _ in range(self.low.interval):
            actions.append(towards(here, to))
            here = here + SPEED * actions[-1]
        return torch.stack(actions, dim=1)
