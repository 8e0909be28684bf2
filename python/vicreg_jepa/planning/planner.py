"""The loop that all planners share: propose candidates, roll them out, keep the best, stop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vicreg_jepa.planning import checks
from vicreg_jepa.planning.energies import (
    Arrival,
    Energy,
    EnergyLike,
    energy_of,
    evaluated,
    to_goal,
)
from vicreg_jepa.planning.model import LatentModel
from vicreg_jepa.planning.noise import Draws

Rows = dict[str, Tensor]  # what a planner knows of each environment and action: [B, H, ...] each


@dataclass(frozen=True)
class Upper:
    """The plans of B environments on a level above the lowest.

    path: [B, H, D], the landmarks of the latents after its macro-actions. goal: [B, D], the one of
    them that is the goal of the level below. between: bool [B], whether that is a subgoal; else it
    is the level's own goal, and so is the whole path.
    """

    path: Tensor
    goal: Tensor
    between: Tensor


@dataclass(frozen=True)
class PlanRequest:
    """What a planner is asked for: plans of B environments.

    start: [B, D], the latents to plan from; energy: what the plans are to minimise, or None for
    `to_goal` of the arrival's goal and threshold; seed: int64 [B], and time: int64 [B] or an
    integer for all, which together determine all random numbers; former: [B, H, A], the former
    plans, shifted to now, or None; arrival: tells whether a predicted path arrives, or None, for a
    planner without effort; above: of a hierarchy's former plans, or (), see Plan.
    """

    start: Tensor
    energy: EnergyLike | None
    seed: Tensor
    time: Tensor | int = 0
    former: Tensor | None = None
    arrival: Arrival | None = None
    above: tuple[Upper, ...] = ()

    @property
    def minimised(self) -> Energy:
        """The energy. Raises ValueError if there is neither an energy nor an arrival."""
        if self.energy is not None:
            return energy_of(self.energy)
        if self.arrival is None:
            raise ValueError("energy: got None without an arrival, takes an energy or an Arrival")
        return to_goal(self.arrival.goal, self.arrival.threshold)


@dataclass(frozen=True)
class Plan:
    """Plans of B environments.

    actions: [B, H, A], each to be held for `repeat` steps of the world; energy: [B], infinite if no
    candidate had a finite one, and then the actions are 0; arrived: bool [B], whether the plan is
    predicted to arrive; iterations: int64 [B]; rollout_steps: int64 [B], the steps of the model
    that were computed; history: [B, iterations], the lowest energy so far after each iteration,
    NaN where none was made; path: [B, H * repeat, D], the predicted latents, NaN beyond the horizon
    that was planned; above: the plans of the levels above, from the lowest to the highest, if the
    planner has any.
    """

    actions: Tensor
    energy: Tensor
    arrived: Tensor
    iterations: Tensor
    rollout_steps: Tensor
    history: Tensor
    path: Tensor
    above: tuple[Upper, ...] = ()

    @property
    def finite(self) -> Tensor:
        """bool [B]: whether any candidate had a finite energy."""
        return torch.isfinite(self.energy)


@dataclass(frozen=True)
class Effort:
    """Effort that grows with the difficulty: an environment stops when arrival is predicted.

    The horizon begins with `horizon` actions and is multiplied by `growth` after every `every`
    iterations, up to the planner's horizon. The search starts again whenever the horizon grows.
    Before the first iteration the former plan is rolled out, and kept if it is still predicted to
    arrive. The planner's `iterations` are the budget.
    """

    horizon: int = 3
    growth: float = 4 / 3
    every: int = 2

    def __post_init__(self) -> None:
        checks.whole("horizon", self.horizon, 1)
        checks.number("growth", self.growth, 1.0)
        checks.whole("every", self.every, 1)

    def horizon_at(self, iteration: int, most: int) -> int:
        grown = self.horizon * self.growth ** (iteration // self.every)
        return min(most, int(grown))

    def horizons(self, planner: Planner) -> list[int]:
        """The horizons that a planner takes, in order."""
        every = (self.horizon_at(i, planner.horizon) for i in range(planner.iterations))
        return sorted(set(every))


def check_horizon(planner: Planner, whose: str = "") -> None:
    """Raises ValueError for a horizon that the planner's effort never comes to. whose: follows
    the horizon in the message.
    """
    assert planner.effort is not None
    longest = planner.effort.horizons(planner)[-1]
    if longest < planner.horizon:
        raise ValueError(
            f"--planner: got horizon={planner.horizon}{whose}, every={planner.effort.every} and "
            f"iterations={planner.iterations}, which end at plans of {longest} actions: takes more "
            "iterations, a smaller every, or a shorter horizon"
        )


def box(actions: Tensor) -> Tensor:
    """Project actions to [-1, 1]."""
    return actions.clamp(-1, 1)


@dataclass(frozen=True, kw_only=True)
class Planner(ABC):
    """A planner: its fields are its settings, its methods work on B environments at once.

    horizon: the number of actions of a plan. repeat: the steps of the world for which an action is
    held. candidates: the action sequences of an iteration. iterations: the iterations of a plan;
    with effort, the most. interval: the steps of the world from one plan to the next, a multiple of
    `repeat` and at most horizon * repeat. warm: whether a plan begins with the former one, shifted.
    effort: an Effort, or None for the whole budget each time. project: maps any actions to allowed
    ones.
    """

    horizon: int = 16
    repeat: int = 5
    candidates: int = 256
    iterations: int = 16
    interval: int = 10
    warm: bool = True
    effort: Effort | None = None
    project: Callable[[Tensor], Tensor] = box

    differentiates = False  # whether `updated` takes the gradients of the energies

    def __post_init__(self) -> None:
        for name in ("horizon", "repeat", "candidates", "iterations", "interval"):
            checks.whole(name, getattr(self, name), 1)
        checks.choice("warm", self.warm, (True, False))
        if self.effort is not None and not isinstance(self.effort, Effort):
            raise ValueError(f"effort: got {self.effort!r}, takes an Effort or None")
        if not callable(self.project):
            raise ValueError(f"project: got {self.project!r}, takes a callable of actions")
        if self.interval % self.repeat or self.interval > self.horizon * self.repeat:
            raise ValueError(
                f"interval: got {self.interval}, takes a multiple of repeat ({self.repeat}) "
                f"up to horizon * repeat ({self.horizon * self.repeat})"
            )

    @abstractmethod
    def begun(self, mean: Tensor, draws: Draws) -> Rows:
        """Return what the planner knows before the first iteration. mean: actions [B, H, A]."""

    @abstractmethod
    def proposed(self, rows: Rows, draws: Draws, iteration: int) -> Tensor:
        """Return candidates [B, K, H, A]."""

    @abstractmethod
    def updated(
        self, rows: Rows, actions: Tensor, energies: Tensor, gradient: Tensor | None, step: int
    ) -> Rows:
        """Return what it knows after an iteration. actions: [B, K, H, A]; energies: [B, K], finite
        or +inf; gradient: as actions, if `differentiates`; step: the number of the iteration.
        """

    def shifted(self, actions: Tensor, steps: int) -> Tensor:
        """Return the rest of a plan [B, H, A] after some steps of the world, with 0 at its end."""
        gone = min(steps // self.repeat, self.horizon)
        return torch.cat([actions[:, gone:], torch.zeros_like(actions[:, :gone])], dim=1)

    def held(self, actions: Tensor) -> Tensor:
        """Repeat the actions of a plan [..., H, A] for each step of the world: [..., H * repeat,
        A].
        """
        return actions.repeat_interleave(self.repeat, dim=-2)

    def plan(self, model: LatentModel, request: PlanRequest) -> Plan:
        """Search for the plans of lowest energy.

        Raises ValueError for a field of the request that has another shape or dtype, for a former
        plan that is not finite, and for a request without arrival if the planner has effort.
        """
        self.check(model, request)
        return self.search(model, request)

    def search(self, model: LatentModel, request: PlanRequest) -> Plan:
        """Plan for a request that was checked. Without effort it is a tensor program of fixed
        shapes that does not wait for the device.
        """
        former = request.former
        if former is None or not self.warm:
            former = request.start.new_zeros(len(request.start), self.horizon, model.actions)
        search = _Search(self, model, request, self.project(former))
        if self.effort is not None and self.warm:
            search.check_former()
        for iteration in range(self.iterations):
            if not len(search.index):
                break
            search.iterate(iteration)
        return search.finished()

    def check(self, model: LatentModel, request: PlanRequest) -> None:
        """Raise ValueError for a request that `plan` does not take."""
        checks.shaped("start", request.start, None, None)
        count = len(request.start)
        checks.shaped("seed", request.seed, count)
        if request.seed.dtype != torch.int64:
            raise ValueError(f"seed: got {request.seed.dtype}, takes torch.int64")
        if not isinstance(request.time, int):
            checks.shaped("time", request.time, count)
        if request.former is not None:
            checks.shaped("former", request.former, count, self.horizon, model.actions)
            checks.finite("former", request.former)
        if self.effort is not None and request.arrival is None:
            raise ValueError("arrival: got None, takes an Arrival, since the planner has an effort")
        if request.above:
            raise ValueError("above: got levels above, takes none: this planner has one level")


class Around:
    """A planner that searches with another one, `planner`, and executes as that one does."""

    planner: Planner

    @property
    def interval(self) -> int:
        return self.planner.interval

    def held(self, actions: Tensor) -> Tensor:
        return self.planner.held(actions)

    def shifted(self, actions: Tensor, steps: int) -> Tensor:
        return self.planner.shifted(actions, steps)


@dataclass(frozen=True)
class _Best:
    """The best plans so far: fields as in Plan."""

    actions: Tensor
    energy: Tensor
    arrived: Tensor
    path: Tensor

    def rows(self, which: Tensor) -> _Best:
        return _Best(self.actions[which], self.energy[which], self.arrived[which], self.path[which])

    def better(self, energy: Tensor, arrived: Tensor, actions: Tensor, path: Tensor) -> _Best:
        """Replace plans by others of lower energy, which may have a shorter horizon."""
        better = energy < self.energy
        each = better[:, None, None]
        horizon, steps = actions.shape[1], path.shape[1]
        return _Best(
            torch.cat(
                [torch.where(each, actions, self.actions[:, :horizon]), self.actions[:, horizon:]],
                dim=1,
            ),
            torch.where(better, energy, self.energy),
            torch.where(better, arrived, self.arrived),
            torch.cat([torch.where(each, path, self.path[:, :steps]), self.path[:, steps:]], dim=1),
        )


class _Search:
    """The search for one batch of plans. `index` holds the environments that are still searching,
    and all other tensors have one row for each of these. Only `plan` has the rows of all
    environments.
    """

    best: _Best

    def __init__(
        self, planner: Planner, model: LatentModel, request: PlanRequest, mean: Tensor
    ) -> None:
        start = request.start
        count, steps = len(start), planner.horizon * planner.repeat
        time = torch.as_tensor(request.time, dtype=torch.int64, device=start.device)
        self.planner, self.model, self.start, self.mean = planner, model, start, mean
        self.energy, self.arrival = request.minimised, request.arrival
        self.draws = Draws(request.seed, time.expand(count))
        self.index = torch.arange(count, device=start.device)
        self.rows = planner.begun(mean, self.draws)
        self.plan = Plan(
            actions=torch.zeros_like(mean),
            energy=start.new_full((count,), torch.inf),
            arrived=torch.zeros(count, dtype=torch.bool, device=start.device),
            iterations=torch.zeros(count, dtype=torch.int64, device=start.device),
            rollout_steps=torch.zeros(count, dtype=torch.int64, device=start.device),
            history=start.new_full((count, planner.iterations), torch.nan),
            path=start.new_full((count, steps, start.shape[1]), torch.nan),
        )
        self._forget(planner.horizon)

    def evaluate(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (paths [B, K, H * repeat, D], energies [B, K], their gradients or None)."""
        differentiate = self.planner.differentiates
        with torch.enable_grad() if differentiate else torch.inference_mode():
            actions = actions.detach().requires_grad_(differentiate)
            every = self.planner.held(actions)
            path = self.model.rollout(self.start, every)
            energies = evaluated(self.energy, path, every)
            gradient = None
            if differentiate:
                finite = energies.where(torch.isfinite(energies), 0.0)
                if finite.requires_grad:
                    (gradient,) = torch.autograd.grad(finite.sum(), actions)
                else:
                    gradient = torch.zeros_like(actions)
        self.plan.rollout_steps[self.index] += every.shape[1] * every.shape[2]
        return path.detach(), energies.detach(), gradient

    def check_former(self) -> None:
        """Keep the former plan if it is predicted to arrive at the end of any of the horizons. Over
        the longest horizon only, a model that drifts would never predict that standing still at
        the goal suffices.
        """
        path, energies, _ = self.evaluate(self.mean[:, None])
        self._keep(self.mean[:, None], path, energies)
        planner, arrived = self.planner, self.best.arrived
        if planner.effort is not None and self.arrival is not None:
            for horizon in planner.effort.horizons(planner):
                arrived = arrived | self.arrival(path[:, 0, : horizon * planner.repeat])
        self.best = replace(self.best, arrived=arrived & torch.isfinite(self.best.energy))
        self._leave()

    def iterate(self, iteration: int) -> None:
        planner = self.planner
        effort, horizon = planner.effort, planner.horizon
        if effort is not None:
            horizon = effort.horizon_at(iteration, horizon)
        if horizon != self.horizon:
            # Energies of different horizons cannot be compared, and a short plan that did not
            # arrive often leads into a dead end: begin anew.
            self._forget(horizon)
            self.rows = planner.begun(self.mean, self.draws)
        seen = {name: value[:, :horizon] for name, value in self.rows.items()}
        actions = planner.project(planner.proposed(seen, self.draws, iteration))
        path, energies, gradient = self.evaluate(actions)
        self._keep(actions, path, energies)
        self.plan.iterations[self.index] += 1
        self.plan.history[self.index, iteration] = self.best.energy
        seen = planner.updated(seen, actions, energies, gradient, iteration)
        self.rows = {
            name: torch.cat([value, self.rows[name][:, horizon:]], dim=1)
            for name, value in seen.items()
        }
        if effort is not None:
            self._leave()

    def finished(self) -> Plan:
        self._write(slice(None))
        return self.plan

    def _forget(self, horizon: int) -> None:
        """Forget the best plan, and search for one of another horizon."""
        count, (_, steps, size) = len(self.index), self.plan.path.shape
        self.horizon = horizon
        self.best = _Best(
            actions=torch.zeros_like(self.mean),
            energy=self.start.new_full((count,), torch.inf),
            arrived=torch.zeros(count, dtype=torch.bool, device=self.start.device),
            path=self.start.new_full((count, steps, size), torch.nan),
        )

    def _keep(self, actions: Tensor, path: Tensor, energies: Tensor) -> None:
        """Keep the best candidate of each environment, where it is better than the best so far."""
        energy, place = energies.min(dim=1)
        rows = torch.arange(len(place), device=place.device)
        chosen = path[rows, place]
        arrived = torch.zeros_like(self.best.arrived)
        if self.arrival is not None:
            arrived = self.arrival(chosen)
        self.best = self.best.better(energy, arrived, actions[rows, place], chosen)

    def _write(self, which: Tensor | slice) -> None:
        where = self.index[which]
        for name in ("actions", "energy", "arrived", "path"):
            getattr(self.plan, name)[where] = getattr(self.best, name)[which]

    def _leave(self) -> None:
        """Write the plans that arrive, and take their environments out of the batch."""
        done = self.best.arrived
        if not bool(done.any()):
            return
        self._write(done.nonzero()[:, 0])
        stay = (~done).nonzero()[:, 0]
        self.index, self.start, self.mean = self.index[stay], self.start[stay], self.mean[stay]
        self.draws, self.energy = self.draws.rows(stay), self.energy.rows(stay)
        if self.arrival is not None:
            self.arrival = self.arrival.rows(stay)
        self.rows = {name: value[stay] for name, value in self.rows.items()}
        self.best = self.best.rows(stay)
