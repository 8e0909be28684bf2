"""Constraints as terms of an energy: the soft forms, which the shield is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vicreg_jepa.planning import checks
from vicreg_jepa.planning.energies import Energy
from vicreg_jepa.planning.guardrails import Constraint
from vicreg_jepa.planning.model import LatentModel
from vicreg_jepa.planning.planner import Around, Plan, Planner, PlanRequest


@dataclass(frozen=True)
class Penalty(Energy):
    """A penalty: weight times the violations along the path, in pixels, summed over the horizon.
    weight: a number, or [B]. The first two numbers of a latent are the position.
    """

    constraint: Constraint
    weight: Tensor | float = 10.0

    def __call__(self, path: Tensor, actions: Tensor) -> Tensor:
        weight = torch.as_tensor(self.weight, device=path.device)
        return weight.view(-1, 1) * violations(self.constraint, path).sum(dim=2)

    def rows(self, which: Tensor) -> Penalty:
        weight = self.weight
        if isinstance(weight, Tensor) and weight.dim():
            weight = weight[which]
        return Penalty(self.constraint.rows(which), weight)


def violations(constraint: Constraint, path: Tensor) -> Tensor:
    """Return [B, K, H]: by how many pixels each position of paths [B, K, H, D] violates a
    constraint.
    """
    count, candidates, steps, _ = path.shape
    which = torch.arange(count, device=path.device).repeat_interleave(candidates * steps)
    clearance = constraint.rows(which).at(path[..., :2].reshape(-1, 2))
    return (-clearance).clamp(min=0).view(count, candidates, steps)


@dataclass(frozen=True)
class Lagrangian(Around):
    """A planner with a multiplier for a constraint, found by dual ascent: it plans, raises the
    multiplier by rate times the plan's violation, and plans again from that plan.
    """

    planner: Planner
    constraint: Constraint
    rounds: int = 3
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.planner.effort is not None:
            # It would keep the plan of the first round, which arrives, whatever the multiplier.
            raise ValueError("planner: got one with an effort, takes one without")
        checks.whole("rounds", self.rounds, 1)
        checks.number("rate", self.rate, open_low=True)

    def plan(self, model: LatentModel, request: PlanRequest) -> Plan:
        energy, former = request.minimised, request.former
        multiplier = request.start.new_zeros(len(request.start))
        plans: list[Plan] = []
        for _ in range(self.rounds):
            total = energy + Penalty(self.constraint, multiplier)
            plan = self.planner.plan(model, replace(request, energy=total, former=former))
            plans.append(plan)
            path = plan.path.nan_to_num(nan=0.0)[:, None]
            broken = violations(self.constraint, path)[:, 0]
            broken = torch.where(torch.isnan(plan.path[..., 0]), 0.0, broken)
            multiplier = multiplier + self.rate * broken.sum(dim=1)
            former = plan.actions
        last = plans[-1]
        return Plan(
            last.actions,
            last.energy,
            last.arrived,
            torch.stack([plan.iterations for plan in plans]).sum(dim=0),
            torch.stack([plan.rollout_steps for plan in plans]).sum(dim=0),
            torch.cat([plan.history for plan in plans], dim=1),
            last.path,
        )
