"""`vicreg-jepa plan`: success of planning with trained world models, beside its controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_jepa.files import output
from vicreg_jepa.planning.evaluate import Result, episodes, followed, rank_correlation
from vicreg_jepa.planning.model import LatentModel, TrueModel, encoded
from vicreg_jepa.planning.planner import Effort, Planner
from vicreg_jepa.planning.planners import ICEM
from vicreg_jepa.worlds.episodes import episode_seed, walks
from vicreg_jepa.worlds.policies import expert, straight, walk
from vicreg_jepa.worlds.world import World

COLLECTION = 2**20  # of the episodes that are planned: no training has so large a seed
WALKS, WALKED = 128, 16  # held-out walks, and their steps, that measure the length of a step
CONTROLS = {"walk": walk, "straight": straight, "expert": expert}
MARGIN = 0.2  # of all episodes, by which planning must surpass walking straight
NEAR = 1.5  # mean steps of a walk: so near to the goal a plan has arrived
TRUE_NEAR = 2.0  # pixels, with the true dynamics


@dataclass(frozen=True)
class Row:
    """One way to act in the same episodes. success: episodes at the goal at the end; the others are
    None for a policy. rollout_steps, iterations: means of an episode. rank: Spearman's correlation
    of an episode's iterations with the length of its shortest path.
    """

    name: str
    episodes: int
    success: int
    rollout_steps: float | None = None
    iterations: float | None = None
    rank: float | None = None
    milliseconds: float | None = None


def seeds_of(count: int) -> Tensor:
    """int64 [count]: the seeds of the episodes that are planned."""
    return torch.tensor([episode_seed(COLLECTION, number) for number in range(count)])


def step_length(model: LatentModel, world: World) -> float:
    """The mean distance between the latents of consecutive frames of held-out walks."""
    states, _ = walks(world, COLLECTION + 1, WALKS, WALKED)
    path = encoded(model, world, states)
    return float(torch.linalg.vector_norm(path[:, 1:] - path[:, :-1], dim=2).mean())


def planned(
    model: Any, world: World, planner: Planner, seeds: Tensor, near: float, keep: bool = False
) -> Result:
    """Episodes of a model; near: the distance of latents at which it has arrived."""
    with torch.no_grad():
        return episodes(model, world, planner, seeds, near, keep=keep)


def row_of(name: str, result: Result) -> Row:
    return Row(
        name,
        len(result.success),
        int(result.success.sum()),
        float(result.rollout_steps.double().mean()),
        float(result.iterations.double().mean()),
        rank_correlation(result.iterations, result.distance),
        result.milliseconds,
    )


def planner() -> Planner:
    """The planner of the command."""
    return ICEM(horizon=12, candidates=192, elites=16, iterations=12, effort=Effort())


def measured(
    runs: Sequence[tuple[str, nn.Module]], world: World, count: int, full: bool = False
) -> tuple[list[Row], Result]:
    """The rows of the table, and the episodes of the first run, with its plans.

    runs: (name, trained method) of the same world. full: whether the first run also plans with the
    whole budget of iterations and horizon each time, which takes 20 to 60 times as many steps of
    the model.
    """
    seeds = seeds_of(count)
    rows = [
        Row(name, count, int(followed(world, policy, seeds).sum()))
        for name, policy in CONTROLS.items()
    ]
    effort = planner()
    true = planned(TrueModel(world), world, effort, seeds, TRUE_NEAR)
    rows.append(row_of("true dynamics", true))
    first: Result | None = None
    for name, method in runs:
        near = NEAR * step_length(method, world)
        result = planned(method, world, effort, seeds, near, keep=first is None)
        rows.append(row_of(name, result))
        if full and first is None:
            whole = planned(method, world, replace(effort, effort=None), seeds, near)
            rows.append(row_of(f"{name}, full budget", whole))
        first = first or result
    assert first is not None
    return rows, first


def table(rows: Sequence[Row]) -> str:
    width = max(len(row.name) for row in rows) + 2
    lines = [
        f"{'at the goal at step 200':<{width}}{'success':>12}{'model steps':>14}{'iterations':>12}"
        f"{'rank corr.':>12}{'ms/episode':>12}"
    ]
    for row in rows:
        line = f"{row.name:<{width}}{row.success:>6} of {row.episodes:<3}"
        if row.rollout_steps is not None:
            line += f"{row.rollout_steps:>13,.0f}{row.iterations:>12.1f}{row.rank:>12.2f}"
            line += f"{row.milliseconds:>12.0f}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> list[str]:
    """What is not as promised, in words: a planner that is not well above walking straight."""
    straight_row = next(row for row in rows if row.name == "straight")
    # Rounded, since binary fractions must not ask for one more.
    least = straight_row.success + math.ceil(round(MARGIN * straight_row.episodes, 9))
    takes = f"takes {least} or more: straight has {straight_row.success}"
    if least > straight_row.episodes:
        takes = (
            f"but straight has {straight_row.success}, too many for a margin of {MARGIN:.0%}: take "
            "more --episodes, or a world that needs a plan"
        )
    return [
        f"{row.name}: {row.success} of {row.episodes}, {takes}"
        for row in rows
        if row.rollout_steps is not None and row.success < least
    ]


def write(rows: Sequence[Row], folder: Path) -> None:
    """Writes plan.json; a correlation that does not exist, of a constant, is null."""
    output.replace_json(folder / "plan.json", [asdict(row) for row in rows])
