"""Planning on several levels: a latent that a level predicts is the goal of the one below.

A level's model maps a latent and a macro-action to the latent after it. Every level searches with
the same planners, from its own time steps; only the lowest plans actions of the world.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vicreg_jepa.models.landmarks import Landmarks
from vicreg_jepa.planning import checks
from vicreg_jepa.planning.energies import Arrival
from vicreg_jepa.planning.hierarchy.energies import Reach, Steps
from vicreg_jepa.planning.model import LatentModel
from vicreg_jepa.planning.planner import Plan, Planner, PlanRequest, Upper


@dataclass(frozen=True)
class Level:
    """A level above the lowest.

    model: its actions are macro-actions. planner: of macro-actions, so its `repeat` is 1; it has no
    effort. interval: the steps of the world from one of its plans to the next. reach: the counted
    steps that the level below is trusted with. A goal within it needs no subgoal; else each latent
    of a path is within it of the one before.
    """

    model: LatentModel
    planner: Planner
    interval: int
    reach: float

    def __post_init__(self) -> None:
        checks.whole("interval", self.interval, 1)
        checks.number("reach", self.reach, open_low=True)
        if self.planner.repeat != 1:
            raise ValueError(
                f"planner: got repeat {self.planner.repeat}, takes 1: a macro-action is not held"
            )
        if self.planner.effort is not None:
            raise ValueError("planner: got one with effort, takes one without")


@dataclass(frozen=True)
class Hierarchy:
    """A planner of two levels or more; it is asked for plans as any other (`plan`, PlanRequest).

    low: the planner of the actions. levels: those above, from the lowest to the highest; each
    `interval` is a multiple of the one below. landmarks: count the steps between latents.

    The highest level seeks the goal. Its energy is the sum over its path of the counted steps from
    there to the goal; paths with a step beyond the reach of the level below are no candidates. It
    hands down the last latent of its path that is in reach from where the environment is, or rather
    the landmark of that: a latent that was seen, where the predicted one may be off all that frames
    can give, and never be arrived at. Where it has no candidate, the goal itself is handed down. A
    plan's rollout_steps and iterations are the sums over all levels.
    """

    low: Planner
    levels: tuple[Level, ...]
    landmarks: Landmarks

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels: got none, takes one or more above the lowest")
        below = self.low.interval
        for level in self.levels:
            if level.interval % below:
                raise ValueError(
                    f"interval: got {level.interval}, takes a multiple of the level below's {below}"
                )
            below = level.interval

    @property
    def interval(self) -> int:
        """The steps of the world from one plan to the next: the lowest level's."""
        return self.low.interval

    def held(self, actions: Tensor) -> Tensor:
        return self.low.held(actions)

    def shifted(self, actions: Tensor, steps: int) -> Tensor:
        return self.low.shifted(actions, steps)

    def plan(self, model: LatentModel, request: PlanRequest) -> Plan:
        """Plan to the goal of the request's arrival, for all environments at one time. `above` of
        the result belongs into the next request: a level keeps its plan until its next one is due.

        Raises ValueError for a request with an energy, since each level makes its own; without an
        arrival; with a time for each environment; and as Planner.plan.
        """
        if request.energy is not None:
            raise ValueError("energy: got one, takes None: each level has its own goal")
        if request.arrival is None:
            raise ValueError("arrival: got None, takes an Arrival, whose goal the levels seek")
        if not isinstance(request.time, int):
            raise ValueError("time: got a tensor, takes an integer: levels plan at fixed times")
        if request.above and len(request.above) != len(self.levels):
            raise ValueError(
                f"above: got {len(request.above)} levels, takes none or {len(self.levels)}"
            )
        spent = [torch.zeros_like(request.seed) for _ in range(2)]
        goal, uppers = request.arrival.goal, []
        for number in reversed(range(len(self.levels))):
            level = self.levels[number]
            if request.above and request.time % level.interval:
                upper = request.above[number]
            else:
                upper = self._searched(level, request, goal, spent)
            uppers.append(upper)
            goal = upper.goal
        near = request.arrival.threshold
        below = replace(request, arrival=Arrival(goal, near, request.arrival.at), above=())
        plan = self.low.plan(model, below)
        return replace(
            plan,
            iterations=plan.iterations + spent[0],
            rollout_steps=plan.rollout_steps + spent[1],
            above=tuple(reversed(uppers)),
        )

    def _searched(
        self, level: Level, request: PlanRequest, goal: Tensor, spent: list[Tensor]
    ) -> Upper:
        """A level's plan to a goal [B, D]; adds its iterations and rollout steps to `spent`."""
        count, size = goal.shape
        path = goal[:, None].expand(count, level.planner.horizon, size).clone()
        below = goal.clone()
        far = ~(self.landmarks.between(request.start, goal) <= level.reach)
        rows = far.nonzero()[:, 0]
        if len(rows):
            start, its = request.start[rows], goal[rows]
            energy = Steps(self.landmarks, its, "sum") + Reach(self.landmarks, start, level.reach)
            plan = level.planner.plan(
                level.model, PlanRequest(start, energy, request.seed[rows], request.time)
            )
            spent[0][rows] += plan.iterations
            spent[1][rows] += plan.rollout_steps
            found = plan.finite
            far[rows[~found]] = False
            rows, start = rows[found], start[found]
            path[rows], below[rows] = self._handed_down(level, start, plan.path[found])
        return Upper(path, below, far)

    def _handed_down(self, level: Level, start: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
        """(the landmarks of a path, [B, H, D]; the last of them that is in reach from the start)"""
        places, _ = self.landmarks.nearest(path)
        here = self.landmarks.nearest(start)[0]
        reached = self.landmarks.steps[here[:, None], places] <= level.reach  # the first always is
        last = (reached * torch.arange(1, places.shape[1] + 1)).argmax(dim=1)
        seen = self.landmarks.places[places]
        return seen, seen[torch.arange(len(last)), last]
