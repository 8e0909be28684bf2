"""Episodes of model predictive control, many environments at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vicreg_jepa.planning import checks
from vicreg_jepa.planning.control import Control, Plans, check_seeds
from vicreg_jepa.planning.energies import EnergyLike
from vicreg_jepa.planning.guardrails import Constraint
from vicreg_jepa.planning.model import LatentModel, observe
from vicreg_jepa.planning.planner import Plan
from vicreg_jepa.planning.shield import Shield
from vicreg_jepa.worlds.world import REACHED, STEPS, State, World


@dataclass
class Result:
    """The results of N episodes of T steps.

    success: bool [N], at the last step. distance: float64 [N], the length of the shortest path
    from the start to the goal, in pixels. goal: [N, 2]. iterations, rollout_steps: int64 [N], the
    sums over all plans of the episode. positions: [N, T + 1, 2] and actions: [N, T, A], as
    executed. milliseconds: the wall time of planning for each environment. changed: int64 [N], the
    number of steps in which the shield did not execute the planned action. plans: all plans in
    order, one every `interval` steps.
    """

    success: Tensor
    distance: Tensor
    goal: Tensor
    iterations: Tensor
    rollout_steps: Tensor
    positions: Tensor
    actions: Tensor
    milliseconds: float
    changed: Tensor
    plans: list[Plan] = field(default_factory=list)

    def steps(self) -> Tensor:
        """int64 [N]: the first step after which the goal is reached; T + 1 if it never is."""
        far = torch.linalg.vector_norm(self.positions - self.goal[:, None], dim=2) > REACHED
        return far.long().cumprod(dim=1).sum(dim=1)

    def clearance(self, constraint: Constraint) -> Tensor:
        """[N]: the least clearance of all executed positions; negative is a violation."""
        count, steps = self.positions.shape[:2]
        which = torch.arange(count, device=self.positions.device).repeat_interleave(steps)
        clearance = constraint.rows(which).at(self.positions.flatten(0, 1))
        return clearance.view(count, steps).amin(dim=1)


def episodes(
    model: LatentModel,
    world: World,
    planner: Plans,
    seeds: Tensor,
    near: float,
    steps: int = STEPS,
    shield: Shield | None = None,
    energy: Callable[[Tensor], EnergyLike] | None = None,
    delay: int = 0,
    probe: Callable[[Tensor], Tensor] | None = None,
    keep: bool = True,
) -> Result:
    """Run an episode for each seed, int64 [N], with a plan every `interval` steps.

    near: a plan has arrived within this distance of the goal's latents. energy: a function of the
    goal's latents [N, D]; by default to_goal. delay: the planner and the shield see the state of so
    many steps ago; it must equal the shield's delay. probe: reads positions [N, 2] from latents for
    the shield; without it the shield sees the true positions. keep: whether the result contains the
    plans. Success is judged after the last step, by world.success. The shield, if any, checks each
    action before world.step executes it, and may raise NoSafeAction.
    """
    check_seeds(seeds)
    checks.number("near", near, open_low=True)
    checks.whole("steps", steps, 1)
    checks.whole("delay", delay, 0)
    if shield is not None and shield.delay != delay:
        raise ValueError(f"delay: got {delay}, takes that of the shield, {shield.delay}")
    state = world.reset(seeds)
    goal = observe(model, world, world.at(state, state.goal))
    control = Control(model, planner, seeds, goal, near, energy, keep)

    def seen_by_shield(seen: State) -> Tensor:
        return seen.position if probe is None else probe(observe(model, world, seen))

    guard = None
    if shield is not None:
        guard = shield.begin(world, seen_by_shield(state), state.layout)
    states, actions = [state], []
    changed = torch.zeros_like(seeds)
    for step in range(steps):
        seen = states[max(0, step - delay)]
        action = control.action(step, partial(observe, model, world, seen))
        if guard is not None:
            wanted = action
            action = guard.act(wanted, seen_by_shield(seen))
            changed = changed + (action != wanted.clamp(-1, 1)).any(dim=1)
        state = world.step(state, action)
        states.append(state)
        actions.append(action.clamp(-1, 1))
    return Result(
        success=world.success(state),
        distance=world.distance(states[0]),
        goal=state.goal,
        iterations=control.iterations,
        rollout_steps=control.rollout_steps,
        positions=torch.stack([each.position for each in states], dim=1),
        actions=torch.stack(actions, dim=1),
        milliseconds=control.milliseconds,
        changed=changed,
        plans=control.plans,
    )


def followed(
    world: World,
    policy: Callable[[World, State], Tensor],
    seeds: Tensor,
    steps: int = STEPS,
) -> Tensor:
    """bool [N]: the success of a policy at the last step, the control of a planner."""
    state = world.reset(seeds)
    for _ in range(steps):
        state = world.step(state, policy(world, state))
    return world.success(state)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of [N] and [N], with mean ranks for ties; NaN if one of them is
    constant.
    """
    a, b = (_ranks(value.double()) for value in (first, second))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def _ranks(value: Tensor) -> Tensor:
    less = (value[None, :] < value[:, None]).sum(dim=1)
    equal = (value[None, :] == value[:, None]).sum(dim=1)
    return less + (equal - 1) / 2
