"""Energies: what a plan minimises.

An energy is a callable of (path [B, K, H, D], actions [B, K, H, A]) that returns [B, K]: the
latents after each action, and the actions themselves. Energies that hold a tensor with a row for
each environment give a subset of these rows by `rows`, so that environments can leave the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vicreg_jepa.planning import checks

EnergyLike = Callable[[Tensor, Tensor], Tensor]


class Energy(ABC):
    """The base class. `+` adds energies and `*` weights them; both also take plain functions."""

    @abstractmethod
    def __call__(self, path: Tensor, actions: Tensor) -> Tensor:
        """Return energies [B, K] of path [B, K, H, D] and actions [B, K, H, A]."""

    def rows(self, which: Tensor) -> Energy:
        """Return the energy of the environments `which`, int64 [M]."""
        return self

    def __add__(self, other: EnergyLike) -> Energy:
        return Sum((self, energy_of(other)))

    def __radd__(self, other: EnergyLike) -> Energy:
        return Sum((energy_of(other), self))

    def __mul__(self, weight: float) -> Energy:
        return Weighted(self, weight)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Function(Energy):
    """A plain function as an energy. It must not depend on which environment a row belongs to."""

    function: EnergyLike

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(f"energy: got {self.function!r}, takes a callable of (path, actions)")

    def __call__(self, path: Tensor, actions: Tensor) -> Tensor:
        return self.function(path, actions)


@dataclass(frozen=True)
class Sum(Energy):
    terms: tuple[Energy, ...]

    def __call__(self, path: Tensor, actions: Tensor) -> Tensor:
        total = self.terms[0](path, actions)
        for term in self.terms[1:]:
            total = total + term(path, actions)
        return total

    def rows(self, which: Tensor) -> Energy:
        return Sum(tuple(term.rows(which) for term in self.terms))


@dataclass(frozen=True)
class Weighted(Energy):
    energy: Energy
    weight: float

    def __post_init__(self) -> None:
        checks.number("weight", self.weight)

    def __call__(self, path: Tensor, actions: Tensor) -> Tensor:
        return self.weight * self.energy(path, actions)

    def rows(self, which: Tensor) -> Energy:
        return Weighted(self.energy.rows(which), self.weight)


@dataclass(frozen=True)
class GoalDistance(Energy):
    """The distance of the latents to those of the goal, [B, D].

    at: "sum" over the horizon, at its "end", or the "min" over it. norm: "l2" the Euclidean
    distance, "l1" the sum of absolute differences, "squared" the square of "l2". most: a distance
    above it counts as `most`.
    """

    goal: Tensor
    at: str = "sum"
    norm: str = "l2"
    most: float | None = None

    def __post_init__(self) -> None:
        checks.choice("at", self.at, ("sum", "end", "min"))
        checks.choice("norm", self.norm, ("l2", "l1", "squared"))
        if self.most is not None:
            checks.number("most", self.most, open_low=True)
        checks.shaped("goal", self.goal, None, None)

    def __call__(self, path: Tensor, actions: Tensor) -> Tensor:
        if self.at == "end":
            path = path[:, :, -1:]
        distance = distances(path, self.goal, self.norm)
        if self.most is not None:
            distance = distance.clamp(max=self.most)
        return distance.amin(dim=2) if self.at == "min" else distance.sum(dim=2)

    def rows(self, which: Tensor) -> Energy:
        return GoalDistance(self.goal[which], self.at, self.norm, self.most)


def to_goal(goal: Tensor, near: float, haste: float = 0.2) -> Energy:
    """The distance to the goal at the end of the horizon, plus `haste` times the sum over the
    horizon of the distance or `near`, whichever is less: a price of the steps before the arrival.

    near: the distance of latents that counts as arrived, as in Arrival. Without the price a plan
    may wander and arrive only at its end, and the arrival is put off from plan to plan. The sum of
    the whole distances would prefer to wait near the goal, behind a wall, to the way around it.
    """
    checks.number("near", near, open_low=True)
    checks.number("haste", haste)
    return GoalDistance(goal, "end") + haste * GoalDistance(goal, "sum", most=near)


@dataclass(frozen=True)
class ControlCost(Energy):
    """weight times the sum of the squared actions over the horizon."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        checks.number("weight", self.weight)

    def __call__(self, path: Tensor, actions: Tensor) -> Tensor:
        return self.weight * actions.square().sum(dim=(2, 3))


@dataclass(frozen=True)
class Arrival:
    """Predicts whether a plan arrives: bool [B] of the latents of one path for each environment,
    [B, H, D].

    goal: [B, D]. threshold: the greatest Euclidean distance of latents that counts as arrived.
    at: "end", the path must arrive and stay; "any", it is enough to pass by.
    """

    goal: Tensor
    threshold: float
    at: str = "end"

    def __post_init__(self) -> None:
        checks.shaped("goal", self.goal, None, None)
        checks.number("threshold", self.threshold)
        checks.choice("at", self.at, ("end", "any"))

    def __call__(self, path: Tensor) -> Tensor:
        near = distances(path[:, None], self.goal, "l2")[:, 0] <= self.threshold  # [B, H]
        return near[:, -1] if self.at == "end" else near.any(dim=1)

    def rows(self, which: Tensor) -> Arrival:
        return Arrival(self.goal[which], self.threshold, self.at)


def distances(path: Tensor, goal: Tensor, norm: str) -> Tensor:
    """[B, K, H]: the distance of each latent of paths [B, K, H, D] to the goal [B, D]."""
    checks.shaped("goal", goal, path.shape[0], path.shape[3])
    difference = path - goal[:, None, None]
    if norm == "l1":
        return difference.abs().sum(dim=3)
    squared = difference.square().sum(dim=3)
    # The gradient of a square root at 0 is infinite: there it is taken as 0.
    return squared if norm == "squared" else squared.clamp(min=1e-12).sqrt()


def energy_of(energy: EnergyLike) -> Energy:
    """Return `energy` if it is an Energy, else wrap the function as one."""
    return energy if isinstance(energy, Energy) else Function(energy)


def evaluated(energy: Energy, path: Tensor, actions: Tensor) -> Tensor:
    """Return the energies [B, K]. Those that are NaN, infinite or -infinite become infinite, so
    that they cannot be the best. Raises ValueError if the energy has another shape.
    """
    value = energy(path, actions)
    if not isinstance(value, Tensor) or value.shape != path.shape[:2]:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"energy: got a result of {got}, takes {list(path.shape[:2])}")
    return torch.where(torch.isfinite(value), value, torch.inf)
