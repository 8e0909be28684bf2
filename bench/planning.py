"""Planning beside the CEM of stable-worldmodel and of eb_jepa: the same model, energy and budget,
in the same episodes, interleaved.

    python -m bench.planning --environments 1 8 64
    python -m bench.planning --run runs/world

The model is the true dynamics, or that of a run of the trainer.

A peer that cannot be imported is left out, and the output says so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vicreg_jepa.data.trajectories import world_of
from vicreg_jepa.planning import report
from vicreg_jepa.planning.control import Plans
from vicreg_jepa.planning.energies import EnergyLike
from vicreg_jepa.planning.evaluate import Result, episodes
from vicreg_jepa.planning.model import LatentModel, TrueModel
from vicreg_jepa.planning.planner import Effort, Plan, PlanRequest
from vicreg_jepa.planning.planners import CEM, ICEM
from vicreg_jepa.training.run import restore
from vicreg_jepa.worlds.two_rooms import TwoRooms
from vicreg_jepa.worlds.world import World

BUDGET: dict[str, Any] = {"horizon": 16, "repeat": 5, "candidates": 128, "iterations": 10}
ELITES, INTERVAL = 24, 20


@dataclass(frozen=True)
class Peer:
    """Another package's CEM. search: a function of (model, request) that returns actions
    [B, H, A].
    """

    search: Callable[[LatentModel, PlanRequest], Tensor]

    interval = INTERVAL

    def held(self, actions: Tensor) -> Tensor:
        return actions.repeat_interleave(BUDGET["repeat"], dim=-2)

    def shifted(self, actions: Tensor, steps: int) -> Tensor:
        gone = steps // BUDGET["repeat"]
        return torch.cat([actions[:, gone:], torch.zeros_like(actions[:, :gone])], dim=1)

    def plan(self, model: LatentModel, request: PlanRequest) -> Plan:
        actions, start = self.search(model, request), request.start
        count, steps = len(start), BUDGET["horizon"] * BUDGET["repeat"]
        iterations = torch.full_like(request.seed, BUDGET["iterations"])
        return Plan(
            actions=actions.clamp(-1, 1),
            energy=start.new_zeros(count),
            arrived=torch.zeros_like(request.seed, dtype=torch.bool),
            iterations=iterations,
            rollout_steps=iterations * BUDGET["candidates"] * steps,
            history=start.new_zeros(count, 0),
            path=start[:, None],
        )


def seed_of(request: PlanRequest) -> int:
    """The seed of a peer's generator, one for all environments: the latest time."""
    return int(torch.as_tensor(request.time).max())


def cost(model: LatentModel, start: Tensor, energy: EnergyLike, actions: Tensor) -> Tensor:
    """[B, K]: the energies of actions [B, K, H, A], which are clamped and held."""
    held = actions.clamp(-1, 1).repeat_interleave(BUDGET["repeat"], dim=2)
    return energy(model.rollout(start, held), held)


def stable_worldmodel() -> Peer:
    """Its CEMSolver, with all environments in one of its batches."""
    from gymnasium.spaces import Box
    from stable_worldmodel.solver.cem import CEMSolver

    def search(model: LatentModel, request: PlanRequest) -> Tensor:
        start = request.start
        costs = SimpleNamespace(
            get_cost=lambda info, actions: cost(
                model, info["start"][:, 0], request.minimised, actions
            )
        )
        solver = CEMSolver(
            costs,
            batch_size=len(start),
            num_samples=BUDGET["candidates"],
            n_steps=BUDGET["iterations"],
            topk=ELITES,
            seed=seed_of(request),
        )
        solver.configure(
            action_space=Box(-1, 1, (len(start), model.actions)),
            n_envs=len(start),
            config=SimpleNamespace(action_block=1, horizon=BUDGET["horizon"]),
        )
        return solver.solve({"start": start}, request.former)["actions"]

    return Peer(search)


def eb_jepa() -> Peer:
    """Its CEMPlanner, which plans for one environment and takes no former plan, called for each."""
    from eb_jepa.planning import CEMPlanner

    def search(model: LatentModel, request: PlanRequest) -> Tensor:
        torch.manual_seed(seed_of(request))
        actions = []
        for number in range(len(request.start)):
            row = torch.tensor([number])
            one = request.minimised.rows(row)
            planner = CEMPlanner(
                lambda first, actions, one=one: cost(  # actions: [K, A, H]
                    model, first, one, actions.transpose(1, 2)[None]
                )[0],
                n_iters=BUDGET["iterations"],
                num_samples=BUDGET["candidates"],
                plan_length=BUDGET["horizon"],
                action_dim=model.actions,
                num_elites=ELITES,
                decode_each_iteration=False,
            )
            planner.set_objective(lambda energies: energies)
            actions.append(planner.plan(request.start[row]).actions)
        return torch.stack(actions)

    return Peer(search)


def contenders() -> dict[str, Plans]:
    planners: dict[str, Plans] = {
        "ours, CEM": CEM(elites=ELITES, interval=INTERVAL, **BUDGET),
        "ours, ICEM with effort": ICEM(
            elites=ELITES, interval=INTERVAL, effort=Effort(every=1), **BUDGET
        ),
    }
    for name, peer in (("stable-worldmodel, CEM", stable_worldmodel), ("eb_jepa, CEM", eb_jepa)):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                planners[name] = peer()
        except ImportError as error:
            print(f"left out: {name} ({error})")
    return planners


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--run", type=Path, help="a trained world model; default: the true one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world: World = TwoRooms()
    model: Any = TrueModel(world)
    near = report.TRUE_NEAR
    if options.run is not None:
        settings, model, _ = restore(options.run)
        world = world_of(settings)
        near = report.NEAR * report.step_length(model, world)
    plans = contenders()
    for count in options.environments:
        results: dict[str, list[Result]] = {name: [] for name in plans}
        for number in range(options.rounds):
            seeds = torch.arange(number * count, (number + 1) * count)
            for name, planner in plans.items():
                with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
                    result = episodes(
                        model, world, planner, seeds, near, steps=options.steps, keep=False
                    )
                results[name].append(result)
        for name, some in results.items():
            times = sorted(result.milliseconds for result in some)
            success = sum(int(result.success.sum()) for result in some)
            print(
                f"{count} environments | {name} | {times[len(times) // 2]:.0f} ms an environment | "
                f"success {success} of {count * options.rounds}",
                flush=True,
            )


if __name__ == "__main__":
    main()
