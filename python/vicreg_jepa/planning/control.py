"""Model predictive control: when a plan is made, and which of its actions is next."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from vicreg_jepa.planning import checks
from vicreg_jepa.planning.energies import Arrival, EnergyLike
from vicreg_jepa.planning.model import LatentModel
from vicreg_jepa.planning.planner import Plan, PlanRequest, Upper


class Plans(Protocol):
    """The methods of a planner that episodes call; Planner documents them."""

    @property
    def interval(self) -> int: ...
    def held(self, actions: Tensor) -> Tensor: ...
    def shifted(self, actions: Tensor, steps: int) -> Tensor: ...
    def plan(self, model: LatentModel, request: PlanRequest) -> Plan: ...


class Control:
    """Model predictive control of N environments: a plan every `interval` steps, whose actions are
    executed until the next one.

    goal: the latents [N, D] to reach. near: a plan has arrived within this distance of the goal's
    latents. energy: a function of the goal's latents; by default to_goal, of each level's own goal
    with a hierarchy. keep: whether the plans are kept in `plans`.
    """

    def __init__(
        self,
        model: LatentModel,
        planner: Plans,
        seeds: Tensor,
        goal: Tensor,
        near: float,
        energy: Callable[[Tensor], EnergyLike] | None = None,
        keep: bool = True,
    ) -> None:
        self.model, self.planner, self.seeds, self.keep = model, planner, seeds, keep
        self.minimised = None if energy is None else energy(goal)
        self.arrives = Arrival(goal, near)
        self.iterations = self.rollout_steps = torch.zeros_like(seeds)
        self.plans: list[Plan] = []
        self.former: Tensor | None = None
        self.above: tuple[Upper, ...] = ()
        self.coming, self.seconds = torch.empty(0), 0.0

    def action(self, step: int, latents: Callable[[], Tensor]) -> Tensor:
        """Return the actions [N, A] of a step. latents: called if a plan is due; returns the
        latents [N, D] of the present frames.
        """
        place = step % self.planner.interval
        if place == 0:
            self._plan(step, latents())
        return self.coming[:, place]

    def _plan(self, step: int, latents: Tensor) -> None:
        begun = time.perf_counter()
        request = PlanRequest(
            latents, self.minimised, self.seeds, step, self.former, self.arrives, self.above
        )
        plan = self.planner.plan(self.model, request)
        self.seconds += time.perf_counter() - begun
        self.coming = self.planner.held(plan.actions)
        self.former = self.planner.shifted(plan.actions, self.planner.interval)
        self.above = plan.above
        self.iterations = self.iterations + plan.iterations
        self.rollout_steps = self.rollout_steps + plan.rollout_steps
        if self.keep:
            self.plans.append(plan)

    @property
    def milliseconds(self) -> float:
        """The wall time of planning for each environment, in milliseconds."""
        return 1000 * self.seconds / len(self.seeds)


def check_seeds(seeds: Tensor) -> None:
    checks.shaped("seeds", seeds, None)
    if seeds.dtype != torch.int64 or not len(seeds):
        raise ValueError(
            f"seeds: got {len(seeds)} of {seeds.dtype}, takes one or more of torch.int64"
        )
