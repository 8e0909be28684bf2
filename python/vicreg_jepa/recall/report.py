"""`vicreg-jepa recall`: what a memory is for, beside controls without it.

The first visits are in a process of their own, which ends. The later ones know the store alone;
where the dot has been serves to draw their starts and goals.
"""

from __future__ import annotations

import math
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vicreg_jepa.config import Config
from vicreg_jepa.evaluation.auroc import auroc
from vicreg_jepa.files import output
from vicreg_jepa.methods import build
from vicreg_jepa.planning.model import LatentModel, encoded
from vicreg_jepa.recall import absence
from vicreg_jepa.recall.places import LearnedPlaces, Motion, TruePlaces, fitted
from vicreg_jepa.recall.visits import SPAN, Models, Visit, begun, drawn_from, visit
from vicreg_jepa.worlds.episodes import episode_seed, walks
from vicreg_jepa.worlds.policies import expert, straight, walk
from vicreg_jepa.worlds.window import MazeWindow
from vicreg_jepa.worlds.world import CHANNELS, STEPS, State

COLLECTION = 2**20 + 5  # of the mazes: no training has so large a seed
LED = 1100  # steps of the visit on which the agent is led around
MORE = 1.2  # mazes for an episode: not every one has a case of (c)
LONGEST = 800  # steps of a visit that ends at the goal
ALIKE, ALIKE_PIXELS = 0.95, (2.0, 3.0)  # the share of places so far apart that look alike
USUAL = 0.95  # of unchanged windows surprise less than what is noticed
WITH, ALONE = "with memory", "the last frames alone"
LEAST, MOST, FEWER, CHANCE = 0.9, 0.4, 0.3, 0.7  # what the verdict asks for
Result = TypeVar("Result")


@dataclass(frozen=True)
class Learned:
    """What a process needs to have the models: the configuration and the weights of the method; the
    weights of the motion, or None if the planner has the true dynamics instead.
    """

    settings: Config
    weights: dict[str, Tensor]
    motion: dict[str, Tensor] | None
    match: float
    name: str

    def models(self, world: MazeWindow) -> Models:
        method: Any = build.method(self.settings, CHANNELS)
        method.load_state_dict(self.weights)
        method.eval()
        if self.motion is None:
            return Models(method, TruePlaces(world), self.match, self.name)
        motion = Motion(self.settings.model.latent, self.settings.data.actions)
        motion.load_state_dict(self.motion)
        places = LearnedPlaces(method, motion.eval().requires_grad_(False))
        return Models(method, places, self.match, self.name)


def match_of(model: LatentModel, world: MazeWindow) -> float:
    """The distance of latents under which ALIKE of all windows lie whose places are ALIKE_PIXELS
    apart, in held-out walks.
    """
    states, _ = walks(world, COLLECTION + 1, 100, 60)
    latents, (low, high) = encoded(model, world, states), ALIKE_PIXELS
    apart = torch.cdist(states.position, states.position)
    near = torch.cdist(latents, latents)[(apart > low) & (apart <= high)]
    return float(near.sort().values[int(ALIKE * (len(near) - 1))])


def learned(settings: Config, method: Any, world: MazeWindow, name: str, true: bool) -> Learned:
    """What the processes need of a trained method. true: the planner has the true dynamics."""
    motion = None if true else fitted(method, world).state_dict()
    return Learned(settings, method.state_dict(), motion, match_of(method, world), name)


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """The result of a function in a process of its own, which ends after it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def before(
    learned: Learned, world: MazeWindow, seeds: Tensor, episodes: int, led: Path, again: Path
) -> tuple[Visit, Visit]:
    """What happens before the restart: the visit to all mazes on which the agent is led, and the
    first visits of (b) to `episodes` of them, each remembered in a store.
    """
    torch.set_num_threads(1)
    models = learned.models(world)
    first = visit(world, world.reset(seeds), models, LED, led, leads=True)
    goals = begun(world, seeds[:episodes], 1)
    return first, visit(world, goals, models, LONGEST, again, ends=True)


@dataclass
class Report:
    """explored: the visit that explored. found: the visits of (a) by name; policies: the successes
    of those that plan nothing; starts: the first states. again: the visits of (b) by name.
    surprises: of (c).
    """

    world: MazeWindow
    explored: Visit
    starts: State
    found: dict[str, Visit]
    policies: dict[str, int]
    again: dict[str, Visit]
    surprises: absence.Surprises


def emptied(folder: Path, name: str, results: str) -> Path:
    """The file of a store that is to be written. That of an earlier run of the same command, which
    has left its results beside it, is removed; another one raises ValueError.
    """
    file = folder / name
    if file.exists() and not (folder / results).exists():
        raise ValueError(f"--output: {folder} has a {name}, takes a folder without one")
    for end in ("", "-wal", "-shm", "-writer"):
        Path(f"{file}{end}").unlink(missing_ok=True)
    return file


def measured(
    learned: Learned,
    world: MazeWindow,
    episodes: int,
    folder: Path,
    say: Callable[[str], None] = print,
) -> Report:
    """Run everything; the store of the exploration stays in the folder."""
    every = torch.tensor([episode_seed(COLLECTION, n) for n in range(math.ceil(MORE * episodes))])
    seeds = every[:episodes]
    store, again = (
        emptied(folder, name, "recall.json") for name in ("memory.store", "again.store")
    )
    some = max(2, episodes // 2)  # (b) takes longest
    led, first = in_new_process(before, learned, world, every, some, store, again)
    cells = led.explored.flatten(1).sum(dim=1).double().mean()
    say(f"led through {cells:.1f} of {world.cells**2} cells in {LED} steps")
    # From here on everything is after the restart: only the stores know what was seen.
    models = learned.models(world)
    starts = begun(world, seeds, 0, led.positions[:episodes])
    with tempfile.TemporaryDirectory() as scratch:

        def copied(name: str) -> Path:
            return Path(shutil.copy(store, Path(scratch) / name))

        ways: dict[str, dict[str, Any]] = {
            WITH: {"store": copied("a")},
            ALONE: {"span": SPAN},
            "this visit alone": {},
        }
        found = {}
        for name, options in ways.items():
            found[name] = visit(world, starts, models, STEPS, **options)
            say(_line(name, found[name]))
        policies = {
            name: int(followed_from(world, policy, starts).sum())
            for name, policy in (("walk", walk), ("straight", straight), ("expert", expert))
        }
        second = elsewhere(world, first.state, first.positions)
        visits = {
            "first visit": first,
            "second visit": visit(world, second, models, LONGEST, again, ends=True),
        }
        for name, its in visits.items():
            say(_line(name, its))
        chosen = absence.cases(world, world.reset(every), led.positions)[:episodes]
        if not chosen:
            raise ValueError(f"--episodes: got {episodes}, with no case of (c), takes more")
        which = torch.tensor([case.maze for case in chosen])
        back = absence.returning(
            world, world.reset(every).rows(which), led.positions[which], chosen
        )
        trip = visit(world, back, models, STEPS, copied("c"))
        surprises = absence.measured(world, models, store, back, trip, chosen)
    return Report(world, led, starts, found, policies, visits, surprises)


def elsewhere(world: MazeWindow, state: State, been: Tensor) -> State:
    """States with the same goals, from other starts: positions of been, [N, T, 2], drawn at random
    from those where the goal is out of view.
    """
    out = [~world.in_view(state._replace(position=place), state.goal) for place in been.unbind(1)]
    position = drawn_from(been, torch.stack(out, dim=1), state.seed, 1)
    return state._replace(position=position, time=torch.zeros_like(state.time))


def followed_from(world: MazeWindow, policy: Any, state: State) -> Tensor:
    for _ in range(STEPS):
        state = world.step(state, policy(world, state))
    return world.success(state)


def table(report: Report) -> str:
    """The results of all three, in lines."""
    count = len(report.starts.seed)
    lines = [f"{f'(a) at the goal after {STEPS} steps':<34}{'success':>12}{'model steps':>14}"]
    for name, success in report.policies.items():
        lines.append(f"{name:<34}{success:>6} of {count}")
    for name, its in report.found.items():
        lines.append(_line(name, its))
    lines += ["", f"{'(b) until the goal':<34}{'success':>12}{'model steps':>14}{'steps':>10}"]
    for name, its in report.again.items():
        lines.append(_line(name, its) + f"{float(its.steps.double().mean()):>10.0f}")
    lines.append(f"the second visit takes {_fewer(report):.0%} fewer model steps than the first")
    surprises = report.surprises
    head = f"(c) out of view for {absence.GONE} steps"
    lines += ["", f"{head:<34}{'surprises more':>16}{'AUROC':>8}{'noticed':>14}"]
    alarm = _alarm(surprises)
    for way, kinds in surprises.changed.items():
        for kind, changed in kinds.items():
            true = surprises.true[way][kind]
            if not true:
                continue
            line = f"{f'{kind}, {way}':<34}{absence.paired(true, changed):>9} of {len(true):<4}"
            line += f"{auroc(true, changed):>8.3f}"
            if way == WITH:
                line += f"{sum(one > alarm for one in changed):>7} of {len(changed)}"
            lines.append(line)
    false = [one for kind in surprises.true[WITH].values() for one in kind]
    lines.append(
        f"noticed: above {USUAL:.0%} of {len(surprises.usual)} unchanged windows, as "
        f"{sum(one > alarm for one in false)} of {len(false)} true scenes are; {surprises.lost} "
        "cases did not come into view"
    )
    return "\n".join(lines)


def _line(name: str, visit: Visit) -> str:
    success = f"{int(visit.success.sum()):>6} of {len(visit.success)}"
    return f"{name:<34}{success:<12}{float(visit.rollout_steps.double().mean()):>14,.0f}"


def _fewer(report: Report) -> float:
    first, second = (
        float(report.again[name].rollout_steps.double().mean())
        for name in ("first visit", "second visit")
    )
    return 1 - second / first


def _alarm(surprises: absence.Surprises) -> float:
    if not surprises.usual:
        return float("inf")
    usual = sorted(surprises.usual)
    return usual[int(USUAL * (len(usual) - 1))]


def verdict(report: Report) -> list[str]:
    """A sentence for each thing that memory should do and does not, or that its control does."""
    count, failed = len(report.starts.seed), []
    success = {name: int(its.success.sum()) for name, its in report.found.items()}
    if success[WITH] < LEAST * count:
        failed.append(f"(a): {success[WITH]} of {count} {WITH}, takes {LEAST:.0%}")
    alone = success[ALONE]
    if alone > MOST * count:
        failed.append(
            f"(a): {alone} of {count} with the last frames alone, takes {MOST:.0%} at most"
        )
    first, second = (int(report.again[n].success.sum()) for n in ("first visit", "second visit"))
    if second < first or _fewer(report) < FEWER:
        failed.append(
            f"(b): {second} and {first} successes, {_fewer(report):.0%} fewer model steps, takes "
            f"as many successes and {FEWER:.0%} fewer"
        )
    for way in absence.WAYS:
        # A case that did not come into view has two scenes that memory did not tell apart.
        right, of = 0, 2 * report.surprises.lost if way == WITH else 0
        for kind, changed in report.surprises.changed[way].items():
            right += absence.paired(report.surprises.true[way][kind], changed)
            of += len(changed)
        if way == WITH and right < LEAST * of:
            failed.append(f"(c): {right} of {of} {way}, takes {LEAST:.0%}")
        if way != WITH and right > CHANCE * of:
            failed.append(f"(c): {right} of {of} {way}, takes {CHANCE:.0%} at most")
    return failed


def listed(its: Any, *names: str) -> dict[str, Any]:
    """Tensors of a result by name, as JSON holds them."""
    return {name: getattr(its, name).tolist() for name in names}


def write(report: Report, folder: Path) -> None:
    """Write recall.json."""

    def of(visit: Visit) -> dict[str, Any]:
        return listed(visit, "success", "steps", "rollout_steps")

    contents = {
        "policies": report.policies,
        "found": {name: of(its) for name, its in report.found.items()},
        "again": {name: of(its) for name, its in report.again.items()},
        "surprises": asdict(report.surprises),
    }
    output.replace_json(folder / "recall.json", contents)
