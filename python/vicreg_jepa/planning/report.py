"""`vicreg-jepa plan`: success of planning with trained world models, beside its controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_jepa.files import output
from vicreg_jepa.models.landmarks import Landmarks, counted
from vicreg_jepa.planning.control import Control, Plans
from vicreg_jepa.planning.energies import EnergyLike
from vicreg_jepa.planning.evaluate import Result, episodes, followed, rank_correlation
from vicreg_jepa.planning.hierarchy.trained import has_levels, true_levels
from vicreg_jepa.planning.model import LatentModel, TrueModel, encoded
from vicreg_jepa.planning.planner import Effort, Planner, check_horizon
from vicreg_jepa.planning.planners import ICEM
from vicreg_jepa.planning.ways import FLAT, LARGE, Above, above_of, ways
from vicreg_jepa.worlds.episodes import episode_seed, walks
from vicreg_jepa.worlds.policies import expert, straight, walk
from vicreg_jepa.worlds.world import STEPS, State, World

COLLECTION = 2**20  # of the episodes that are planned: no training has so large a seed
WALKS, WALKED = 128, 16  # held-out walks, and their steps, that measure the length of a step
CONTROLS = {"walk": walk, "straight": straight, "expert": expert}
COUNTED_WALKS, COUNTED_STEPS = 600, 90  # that are counted with the true dynamics
SPACING = 2.2  # pixels between their landmarks
MARGIN = 0.2  # of all episodes, by which planning must surpass walking straight
NEAR = 1.5  # mean steps of a walk: so near to the goal a plan has arrived
TRUE = "true dynamics"
TRUE_NEAR = 2.0  # pixels, with the true dynamics


@dataclass(frozen=True)
class Row:
    """The results of one way to act in the same episodes. success: the number of episodes that end
    at the goal. The other fields are None for a policy. rollout_steps, iterations: means over
    episodes. rank: Spearman's correlation of an episode's iterations with the length of its
    shortest path. milliseconds: the wall time of planning for each episode. thirds: the successes
    of each third of the episodes by the length of the shortest path, the shortest first. of: the
    name of the row that this one is a control of.
    """

    name: str
    episodes: int
    success: int
    rollout_steps: float | None = None
    iterations: float | None = None
    rank: float | None = None
    milliseconds: float | None = None
    thirds: list[int] | None = None
    of: str | None = None


def seeds_of(count: int) -> Tensor:
    """int64 [count]: the seeds of the episodes that are planned."""
    return torch.tensor([episode_seed(COLLECTION, number) for number in range(count)])


def step_length(model: LatentModel, world: World) -> float:
    """The mean distance between the latents of consecutive frames of held-out walks."""
    states, _ = walks(world, COLLECTION + 1, WALKS, WALKED)
    path = encoded(model, world, states)
    return float(torch.linalg.vector_norm(path[:, 1:] - path[:, :-1], dim=2).mean())


def planned(
    model: Any,
    world: World,
    planner: Plans,
    seeds: Tensor,
    near: float,
    steps: int = STEPS,
    keep: bool = False,
    energy: Callable[[Tensor], EnergyLike] | None = None,
) -> Result:
    """Run episodes of a model. near: a plan has arrived this near to the goal's latents."""
    with torch.no_grad():
        return episodes(model, world, planner, seeds, near, steps, keep=keep, energy=energy)


def row_of(name: str, result: Result) -> Row:
    return Row(
        name,
        len(result.success),
        int(result.success.sum()),
        float(result.rollout_steps.double().mean()),
        float(result.iterations.double().mean()),
        rank_correlation(result.iterations, result.distance),
        result.milliseconds,
        thirds(result.success, result.distance),
    )


def thirds(success: Tensor, distance: Tensor) -> list[int]:
    """The successes among the third of the episodes with the shortest paths, the next, the rest."""
    order = distance.argsort(stable=True)
    return [int(success[part].sum()) for part in order.tensor_split(3)]


def row_of_control(name: str, success: Tensor, control: Control) -> Row:
    """A row of episodes whose shortest paths are not known."""
    return Row(
        name,
        len(success),
        int(success.sum()),
        float(control.rollout_steps.double().mean()),
        float(control.iterations.double().mean()),
        milliseconds=control.milliseconds,
    )


def planner(settings: dict[str, Any] | None = None) -> Planner:
    """Make the command's planner, iCEM with effort. settings: override the command's own; `every`
    is its effort's. Raises ValueError for a setting that it does not take.

    Four iterations of each horizon: with two the search is far from its end, so that chance decides
    whether a plan is found, and the effort follows chance and not the difficulty.
    """
    chosen = dict(settings or {})
    takes = ["every"] + [one.name for one in fields(ICEM) if one.name not in ("effort", "project")]
    for name in chosen:
        if name not in takes:
            raise ValueError(f"--planner: got {name!r}, takes {', '.join(takes)}")
    every = chosen.pop("every", 4)
    defaults = {"horizon": 12, "candidates": 192, "elites": 16, "iterations": 20}
    effort = Effort(horizon=1, growth=2.0, every=every)
    made = ICEM(**{**defaults, **chosen}, effort=effort)
    check_horizon(made)
    return made


def measured(
    runs: Sequence[tuple[str, nn.Module]],
    world: World,
    effort: Planner,
    count: int,
    full: bool = False,
    steps: int = STEPS,
    low: Planner | None = None,
) -> tuple[list[Row], Result]:
    """The rows of the table, and the episodes of the first run, with its plans.

    runs: (name, trained method) of the same world. effort: a planner that has one. full: whether
    the first run also plans with the whole budget of iterations and horizon each time, which takes
    up to 70 times as many steps of the model. steps: of an episode. low: the planner of the lowest
    level, for methods with levels; beside them stands flat planning with `low`, with `low` and the
    counted steps as its energy, and if `full` with `effort`. If the first run has levels, the true
    dynamics have as many, and the same controls.
    """
    seeds = seeds_of(count)
    distance = world.distance(world.reset(seeds))
    rows = []
    for name, policy in CONTROLS.items():
        success = followed(world, policy, seeds, steps)
        rows.append(Row(name, count, int(success.sum()), thirds=thirds(success, distance)))

    def played(
        name: str, model: LatentModel, near: float, above: Above | None, full: bool, keep: bool
    ) -> Result:
        """Add the rows of a model, and of its controls; above: what stands above its planner.
        Returns the episodes of the model's own way.
        """
        own = {}
        for way in ways(effort, low, above, full):
            keeps = keep and not way.kind
            result = planned(model, world, way.planner, seeds, near, steps, keeps, way.energy)
            rows.append(replace(row_of(f"{name}{way.kind}", result), of=way.of(name)))
            own[way.kind] = result
        return own[""]

    truth, first = TrueModel(world), runs[0][1]
    above: Above | None = (
        (true_levels(truth, first), true_landmarks(truth)) if has_levels(first) else None
    )
    played(TRUE, truth, TRUE_NEAR, above, full=full and above is not None, keep=False)
    results = []
    for name, method in runs:
        near, is_first = NEAR * step_length(method, world), method is first
        above = above_of(method)
        results.append(played(name, method, near, above, full and is_first, keep=is_first))
    return rows, results[0]


def true_landmarks(model: TrueModel) -> Landmarks:
    """Those of random walks in the world of a model, for which no latent is learned."""
    states, _ = walks(model.world, COLLECTION + 3, COUNTED_WALKS, COUNTED_STEPS)
    flat = State(*(field.flatten(0, 1) for field in states))
    return counted(model.observe(flat).unflatten(0, states.seed.shape), SPACING)


def table(rows: Sequence[Row]) -> str:
    width = max(len(row.name) for row in rows) + 2
    lines = [
        f"{'at the goal at the end':<{width}}{'success':>12}{'model steps':>14}{'iterations':>12}"
        f"{'rank corr.':>12}{'ms/episode':>12}{'  by thirds of path length':>27}"
    ]
    for row in rows:
        line = f"{row.name:<{width}}{row.success:>6} of {row.episodes:<3}"
        if row.rollout_steps is not None:
            rank = "" if row.rank is None else f"{row.rank:.2f}"
            line += f"{row.rollout_steps:>13,.0f}{row.iterations:>12.1f}{rank:>12}"
            line += f"{row.milliseconds:>12.0f}"
        if row.thirds is not None:
            line += " " * (width + 74 - len(line)) + "   ".join(map(str, row.thirds))
        lines.append(line.rstrip())
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each planner that is not well above its control, which is walking
    straight at the goal, or a random walk in an environment without that control; and for each
    hierarchy that flat planning is not well below: it takes MARGIN more successes with no more
    rollout steps, or as many with a third of them.
    """
    success = {row.name: row.success for row in rows}
    control = "straight" if "straight" in success else "walk"
    count = rows[0].episodes
    # Rounded, since binary fractions must not ask for one more.
    margin = math.ceil(round(MARGIN * count, 9))
    least = success[control] + margin
    takes = f"takes {least} or more: {control} has {success[control]}"
    if least > count:
        takes = (
            f"but {control} has {success[control]}, too many for a margin of {MARGIN:.0%}: take "
            "more --episodes, or a world that needs a plan"
        )
    planned = [row for row in rows if row.rollout_steps is not None and row.of is None]
    words = [f"{row.name}: {row.success} of {count}, {takes}" for row in planned
             if row.success < least]  # fmt: skip
    for flat in rows:
        for row in planned:
            distances = flat.name.endswith((FLAT, LARGE))  # of latents
            compared = flat.of == row.name != TRUE and distances
            if compared and not _above(row, flat, margin):
                words.append(
                    f"{row.name}: {row.success} of {count} with {row.rollout_steps:,.0f} model "
                    f"steps, flat planning has {flat.success} with {flat.rollout_steps:,.0f}"
                )
    return words


def _above(row: Row, flat: Row, margin: int) -> bool:
    steps, its = row.rollout_steps or 0.0, flat.rollout_steps or 0.0
    better = row.success >= flat.success + margin and steps <= its
    return better or (row.success >= flat.success and 3 * steps <= its)


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write plan.json. The correlation of a constant does not exist and becomes null."""
    output.replace_json(folder / "plan.json", [asdict(row) for row in rows])
