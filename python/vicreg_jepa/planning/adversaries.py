"""What tries to break the shield, and the proof that it fails: 0 violations with the shield, some
without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vicreg_jepa.planning import checks, zones
from vicreg_jepa.planning.control import Plans
from vicreg_jepa.planning.energies import Energy, GoalDistance
from vicreg_jepa.planning.evaluate import Result, episodes
from vicreg_jepa.planning.guardrails import Zone
from vicreg_jepa.planning.model import LatentModel, TrueModel
from vicreg_jepa.planning.penalties import Lagrangian, Penalty
from vicreg_jepa.planning.planner import Plan, Planner, PlanRequest
from vicreg_jepa.planning.planners import ICEM
from vicreg_jepa.planning.shield import Shield
from vicreg_jepa.worlds.world import State, World

NEAR = 2.0  # pixels: so near to the goal a plan has arrived
HASTE = 0.003  # in the energy, the weight of the sum of the distances over the horizon
FORMS = ("none", "penalty", "lagrangian", "shield")  # how a constraint is imposed


def small_planner() -> ICEM:
    """A planner for thousands of episodes."""
    return ICEM(candidates=64, elites=12, kept=4, iterations=3, horizon=12, interval=20)


@dataclass(frozen=True)
class Untrained(TrueModel):
    """A model with random weights in place of the dynamics."""

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        size = start.shape[1]
        weight = torch.randn(self.actions + size, size, generator=generator).to(start)
        far = start[:, None, None].expand(-1, *actions.shape[1:3], -1)
        return far + 10 * torch.tanh(torch.cat([actions.cumsum(dim=2), far / 64], 3) @ weight)


@dataclass(frozen=True)
class Steered:
    """A planner that ignores the energy and steers into a zone, around walls: the worst action of
    all. It takes the latents of TrueModel.

    scale: of the actions. broken: a value that replaces one coordinate in each second step.
    """

    world: World
    zone: Zone
    scale: float = 1.0
    broken: float | None = None

    interval = 1

    def held(self, actions: Tensor) -> Tensor:
        return actions

    def shifted(self, actions: Tensor, steps: int) -> Tensor:
        return actions

    def plan(self, model: LatentModel, request: PlanRequest) -> Plan:
        start, seed = request.start, request.seed
        layout = start[:, 2:].round().long().view(-1, *self.world.layout_shape)
        state = State(start[:, :2], self.zone.centre, layout, seed, seed)
        action = self.scale * self.world.expert(state)
        if self.broken is not None and int(torch.as_tensor(request.time).max()) % 2:
            action[:, 1] = self.broken
        none = torch.zeros_like(seed)
        return Plan(
            actions=action[:, None],
            energy=start.new_zeros(len(start)),
            arrived=none.bool(),
            iterations=none,
            rollout_steps=none,
            history=start.new_zeros(len(start), 0),
            path=start[:, None],
        )


@dataclass(frozen=True)
class Broken(Energy):
    """An energy that is NaN, inf or -inf for most candidates, or for all of them."""

    energy: Energy
    all: bool = False

    def __call__(self, path: Tensor, actions: Tensor) -> Tensor:
        value = self.energy(path, actions)
        kinds = value.new_tensor([torch.nan, torch.inf, -torch.inf])
        number = torch.arange(value.shape[1], device=value.device)
        broken = kinds[number % 3].expand_as(value)
        return broken if self.all else torch.where(number % 4 > 0, broken, value)

    def rows(self, which: Tensor) -> Broken:
        return Broken(self.energy.rows(which), self.all)


@dataclass(frozen=True)
class Adversary:
    """One way of trying to violate a zone.

    zone: a function of the world and the first states. model: of the world. planner: of the world,
    a planner and the zone. energy: of the energy. delay: of the observations, in steps. executes:
    whether its actions can be executed without a shield (World.step takes only finite ones).
    """

    zone: Callable[[World, State], Zone] = zones.on_the_way
    model: Callable[[World], TrueModel] = TrueModel
    planner: Callable[[World, Plans, Zone], Plans] = lambda world, planner, zone: planner
    energy: Callable[[Energy], Energy] = lambda energy: energy
    delay: int = 0
    executes: bool = True


ADVERSARIES: dict[str, Adversary] = {
    "goal-seeking": Adversary(),
    "goal in the zone": Adversary(zone=zones.at_the_goal),
    "random weights": Adversary(model=Untrained, zone=zones.beside_the_start),
    "some energies NaN or infinite": Adversary(energy=Broken, zone=zones.at_the_goal),
    "all energies NaN or infinite": Adversary(
        energy=lambda energy: Broken(energy, all=True), zone=zones.beside_the_start
    ),
    "worst action": Adversary(planner=lambda world, planner, zone: Steered(world, zone)),
    "actions out of bounds": Adversary(
        planner=lambda world, planner, zone: Steered(world, zone, scale=1e6)
    ),
    "actions NaN": Adversary(
        planner=lambda world, planner, zone: Steered(world, zone, broken=torch.nan), executes=False
    ),
    "worst action, seen late": Adversary(
        planner=lambda world, planner, zone: Steered(world, zone), delay=1
    ),
    "goal in the zone, seen late": Adversary(zone=zones.at_the_goal, delay=1),
}


@dataclass(frozen=True)
class Trial:
    """Episodes of one adversary under one form of the constraint.

    violations: the number of episodes with an executed state inside the zone. clearance: the least
    distance to the zone, in pixels. success: the number of episodes at the goal at the end. steps:
    the mean number of steps to the goal, of the episodes that ended there. changed: the mean number
    of steps in which the shield executed another action than the planned one.
    """

    adversary: str
    form: str
    episodes: int
    violations: int
    clearance: float
    success: int
    steps: float
    changed: float


def trial(
    world: World,
    name: str,
    form: str,
    seeds: Tensor,
    planner: Planner | None = None,
    steps: int = 200,
    weight: float = 1.0,
) -> Trial:
    """Run the episodes of an adversary. form: one of FORMS, or "shield with penalty". weight: of
    the penalty in the energy.
    """
    checks.choice("name", name, tuple(ADVERSARIES))
    checks.choice("form", form, (*FORMS, "shield with penalty"))
    adversary = ADVERSARIES[name]
    zone = adversary.zone(world, world.reset(seeds))
    planner = small_planner() if planner is None else planner
    plans: Plans = Lagrangian(planner, zone) if form == "lagrangian" else planner
    soft = form in ("penalty", "shield with penalty")

    def energy(goal: Tensor) -> Energy:
        total = GoalDistance(goal, "end") + HASTE * GoalDistance(goal)
        return adversary.energy(total + Penalty(zone, weight) if soft else total)

    shield = None
    if form.startswith("shield"):
        shield = Shield((zone,), noise=world.noise, delay=adversary.delay)
    result = episodes(
        adversary.model(world),
        world,
        adversary.planner(world, plans, zone),
        seeds,
        NEAR,
        steps=steps,
        shield=shield,
        energy=energy,
        delay=adversary.delay,
        keep=False,
    )
    return _judged(name, form, result, zone)


def _judged(name: str, form: str, result: Result, zone: Zone) -> Trial:
    clearance = result.clearance(zone)
    reached = result.steps()[result.success].double()
    return Trial(
        adversary=name,
        form=form,
        episodes=len(clearance),
        violations=int((clearance < 0).sum()),
        clearance=float(clearance.amin()),
        success=int(result.success.sum()),
        steps=float(reached.mean()),
        changed=float(result.changed.double().mean()),
    )


def proof(
    world: World,
    seeds: Tensor,
    planner: Planner | None = None,
    steps: int = 200,
    batch: int = 250,
) -> list[Trial]:
    """Every adversary under every form that can be executed, `batch` episodes at once."""
    trials = []
    for name, adversary in ADVERSARIES.items():
        for form in FORMS:
            if form == "shield" or adversary.executes:
                some = [
                    trial(world, name, form, part, planner, steps) for part in seeds.split(batch)
                ]
                trials.append(_joined(some))
    return trials


def _joined(trials: list[Trial]) -> Trial:
    count = sum(each.episodes for each in trials)
    success = sum(each.success for each in trials)
    reached = sum(each.steps * each.success for each in trials if each.success)
    return replace(
        trials[0],
        episodes=count,
        violations=sum(each.violations for each in trials),
        clearance=min(each.clearance for each in trials),
        success=success,
        steps=reached / success if success else float("nan"),
        changed=sum(each.changed * each.episodes for each in trials) / count,
    )


def table(trials: list[Trial]) -> str:
    """A Markdown table of trials."""
    lines = [
        "| adversary | form | episodes | with a violation | least clearance | success | steps |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in trials:
        lines.append(
            f"| {each.adversary} | {each.form} | {each.episodes} | {each.violations} | "
            f"{each.clearance:.3f} | {each.success} | {each.steps:.0f} |"
        )
    return "\n".join(lines)
