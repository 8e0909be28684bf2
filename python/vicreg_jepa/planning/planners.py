"""The planners: CEM, iCEM, MPPI, gradient descent, and CEM over discrete actions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vicreg_jepa.planning import checks
from vicreg_jepa.planning.noise import Draws, coloured
from vicreg_jepa.planning.planner import Planner, Rows


@dataclass(frozen=True, kw_only=True)
class CEM(Planner):
    """The cross-entropy method: candidates from a normal distribution of independent actions, whose
    mean and deviation become those of the best candidates, the elites.

    elites: their number. deviation: of the first iteration; least: the lowest later one. momentum:
    the share of the former mean and deviation that is kept. colour: the exponent of the noise's
    power spectrum 1 / f**colour over the horizon; 0 is white noise, 2 a random walk.
    The first candidate of an iteration is the mean itself.
    """

    elites: int = 24
    deviation: float = 1.0
    least: float = 0.3
    momentum: float = 0.3
    colour: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole("elites", self.elites, 1, self.candidates)
        checks.number("deviation", self.deviation, open_low=True)
        checks.number("least", self.least)
        checks.number("momentum", self.momentum, most=1.0)
        checks.number("colour", self.colour)

    def begun(self, mean: Tensor, draws: Draws) -> Rows:
        return {"mean": mean, "deviation": torch.full_like(mean, self.deviation)}

    def noise(self, draws: Draws, iteration: int, horizon: int, actions: int) -> Tensor:
        """[B, K - 1, H, A], of unit variance."""
        white = draws.normal(iteration, self.candidates - 1, actions, horizon)
        if self.colour:
            white = white @ coloured(horizon, self.colour, white.device)
        return white.transpose(2, 3)

    def proposed(self, rows: Rows, draws: Draws, iteration: int) -> Tensor:
        mean = rows["mean"][:, None]
        noise = self.noise(draws, iteration, *rows["mean"].shape[1:])
        return torch.cat([mean, mean + rows["deviation"][:, None] * noise], dim=1)

    def updated(
        self, rows: Rows, actions: Tensor, energies: Tensor, gradient: Tensor | None, step: int
    ) -> Rows:
        lowest, elites = best(actions, energies, self.elites)
        # Candidates without a finite energy are no elites; without any, nothing changes.
        weight = torch.isfinite(lowest).to(actions)
        share = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
        share = share[:, :, None, None]
        mean = (share * elites).sum(dim=1)
        deviation = (share * (elites - mean[:, None]).square()).sum(dim=1).sqrt()
        some = (weight.sum(dim=1) > 0)[:, None, None]
        kept = self.momentum
        mean = kept * rows["mean"] + (1 - kept) * mean
        deviation = kept * rows["deviation"] + (1 - kept) * deviation
        return rows | {
            "mean": torch.where(some, mean, rows["mean"]),
            "deviation": torch.where(some, deviation.clamp(min=self.least), rows["deviation"]),
        }


@dataclass(frozen=True, kw_only=True)
class ICEM(CEM):
    """CEM with noise that is correlated in time, and with the best candidates of an iteration among
    those of the next one (Pinneri et al., 2020). The former plan, shifted, is the first candidate.

    kept: the number of elites that are kept.
    """

    colour: float = 2.0
    kept: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole("kept", self.kept, 1, self.elites)
        if self.candidates < self.kept + 2:
            raise ValueError(
                f"candidates: got {self.candidates}, takes {self.kept + 2} or more, kept + 2"
            )

    def begun(self, mean: Tensor, draws: Draws) -> Rows:
        kept = mean[:, :, None].expand(-1, -1, self.kept, -1)
        return super().begun(mean, draws) | {"kept": kept}

    def proposed(self, rows: Rows, draws: Draws, iteration: int) -> Tensor:
        fresh = super().proposed(rows, draws, iteration)
        if iteration == 0:  # the kept ones are copies of the mean
            return fresh
        kept = rows["kept"].transpose(1, 2)
        return torch.cat([fresh[:, : self.candidates - self.kept], kept], dim=1)

    def updated(
        self, rows: Rows, actions: Tensor, energies: Tensor, gradient: Tensor | None, step: int
    ) -> Rows:
        rows = super().updated(rows, actions, energies, gradient, step)
        _, elites = best(actions, energies, self.kept)
        return rows | {"kept": elites.transpose(1, 2)}


@dataclass(frozen=True, kw_only=True)
class MPPI(CEM):
    """Model predictive path integral control: the mean of all candidates, weighted by
    exp(-(energy - lowest) / (temperature * spread)), with a constant deviation. The spread is the
    mean of energy - lowest, so the temperature has no unit.
    """

    temperature: float = 0.1
    colour: float = 2.0
    deviation: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("temperature", self.temperature, open_low=True)

    def updated(
        self, rows: Rows, actions: Tensor, energies: Tensor, gradient: Tensor | None, step: int
    ) -> Rows:
        finite = torch.isfinite(energies)
        lowest = energies.amin(dim=1, keepdim=True)
        above = torch.where(finite, energies - lowest, 0.0)
        spread = above.sum(dim=1, keepdim=True) / finite.sum(dim=1, keepdim=True).clamp(min=1)
        weight = torch.exp(-above / (self.temperature * spread).clamp(min=1e-12)) * finite
        share = weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-12)
        mean = (share[:, :, None, None] * actions).sum(dim=1)
        some = finite.any(dim=1)[:, None, None]
        return rows | {"mean": torch.where(some, mean, rows["mean"])}


@dataclass(frozen=True, kw_only=True)
class Gradient(Planner):
    """Adam over the actions of each candidate, from different starts, projected after each step.
    The first start is the former plan.

    candidates: the number of starts. deviation: of the starts around the former plan; colour: of
    their noise, as in CEM. rate: of Adam. Gradients that are not finite count as 0.
    """

    candidates: int = 16
    iterations: int = 40
    deviation: float = 0.7
    colour: float = 2.0
    rate: float = 0.2

    differentiates = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("deviation", self.deviation)
        checks.number("colour", self.colour)
        checks.number("rate", self.rate, open_low=True)

    def begun(self, mean: Tensor, draws: Draws) -> Rows:
        _, horizon, actions = mean.shape
        white = draws.normal(0, self.candidates, actions, horizon)
        noise = (white @ coloured(horizon, self.colour, mean.device)).permute(0, 3, 1, 2)
        noise[:, :, 0] = 0
        starts = self.project(mean[:, :, None] + self.deviation * noise)
        return {
            "actions": starts,  # [B, H, K, A], as the moments
            "first": torch.zeros_like(starts),
            "second": torch.zeros_like(starts),
        }

    def proposed(self, rows: Rows, draws: Draws, iteration: int) -> Tensor:
        return rows["actions"].transpose(1, 2)

    def updated(
        self, rows: Rows, actions: Tensor, energies: Tensor, gradient: Tensor | None, step: int
    ) -> Rows:
        if gradient is None:
            raise RuntimeError("gradient: got None, takes the gradients of the energies")
        g = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).transpose(1, 2)
        first = 0.9 * rows["first"] + 0.1 * g
        second = 0.999 * rows["second"] + 0.001 * g.square()
        mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        moved = rows["actions"] - self.rate * mean / (square.sqrt() + 1e-8)
        return {"actions": self.project(moved), "first": first, "second": second}


@dataclass(frozen=True, kw_only=True)
class CategoricalCEM(Planner):
    """CEM over discrete actions: candidates from independent categorical distributions, whose
    probabilities become the frequencies among the elites.

    choices: the actions, float [M, A] in [-1, 1]. elites, momentum: as in CEM. least: the lowest
    probability of a choice. Every candidate is made of choices, and so is the plan; a former plan
    counts through the choices next to its actions, with probability `trust`.
    """

    choices: Tensor
    elites: int = 24
    momentum: float = 0.1
    least: float = 0.01
    trust: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.shaped("choices", self.choices, None, None)
        checks.finite("choices", self.choices)
        if not len(self.choices):
            raise ValueError("choices: got no action, takes one or more")
        checks.whole("elites", self.elites, 1, self.candidates)
        checks.number("momentum", self.momentum, most=1.0)
        checks.number("least", self.least, most=1 / len(self.choices))
        checks.number("trust", self.trust, most=1.0)

    def _nearest(self, actions: Tensor) -> Tensor:
        """The one-hot choices [..., M] next to actions [..., A]."""
        choices = self.choices.to(actions)
        distance = (actions[..., None, :] - choices).square().sum(dim=-1)
        return torch.nn.functional.one_hot(distance.argmin(dim=-1), len(choices)).to(actions)

    def begun(self, mean: Tensor, draws: Draws) -> Rows:
        equal = 1 / len(self.choices)
        former = self._nearest(mean)
        planned = (mean != 0).any(dim=2).any(dim=1)[:, None, None]  # a plan of zeros is none
        mixed = self.trust * former + (1 - self.trust) * equal
        return {"probability": torch.where(planned, mixed, torch.full_like(former, equal))}

    def proposed(self, rows: Rows, draws: Draws, iteration: int) -> Tensor:
        cumulated = rows["probability"].cumsum(dim=2)[:, None]  # [B, 1, H, M]
        u = draws.uniform(iteration, self.candidates, cumulated.shape[2])
        which = (u[..., None] > cumulated).sum(dim=3).clamp(max=len(self.choices) - 1)
        likeliest = rows["probability"].argmax(dim=2)[:, None]
        which = torch.cat([likeliest, which[:, 1:]], dim=1)
        return self.choices.to(u)[which]

    def updated(
        self, rows: Rows, actions: Tensor, energies: Tensor, gradient: Tensor | None, step: int
    ) -> Rows:
        lowest, elites = best(actions, energies, self.elites)
        weight = torch.isfinite(lowest).to(actions)[:, :, None, None]
        counted = (weight * self._nearest(elites)).sum(dim=1)
        share = counted / weight.sum(dim=1).clamp(min=1)
        probability = self.momentum * rows["probability"] + (1 - self.momentum) * share
        probability = probability.clamp(min=self.least)
        probability = probability / probability.sum(dim=2, keepdim=True)
        some = torch.isfinite(lowest).any(dim=1)[:, None, None]
        return {"probability": torch.where(some, probability, rows["probability"])}


def best(actions: Tensor, energies: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """([B, count], [B, count, H, A]): the lowest energies, and their candidates."""
    lowest, places = energies.topk(count, dim=1, largest=False)
    rows = torch.arange(len(places), device=places.device)[:, None]
    return lowest, actions[rows, places]
