"""`vicreg-jepa act`: the whole system in mazes, and without each of its parts, beside controls.

On a first visit, in a process of its own, the agent is led around and remembers. Then the system
knows the store alone: it is put down somewhere, shown the picture at the goal, put elsewhere in
step PUSHED, and must not enter a zone that lies on the way.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vicreg_jepa.act.episodes import PUSHED, Acted, Scene, acted, alarm_of, followed, scene
from vicreg_jepa.act.system import Parts
from vicreg_jepa.files import output
from vicreg_jepa.recall.report import COLLECTION, LED, Learned, emptied, in_new_process, listed
from vicreg_jepa.recall.visits import Visit, begun, visit
from vicreg_jepa.worlds.episodes import episode_seed
from vicreg_jepa.worlds.policies import expert, straight, walk
from vicreg_jepa.worlds.window import MazeWindow

WHOLE = "the whole system"
WITHOUT = ("memory", "surprise", "levels", "planning", "shield")
LEAST, LESS = 0.8, 0.2  # what the verdict asks for: the success, and what a part adds to it
CALIBRATION = COLLECTION + 3  # of the walks that give the alarm: no training has so large a seed


@dataclass
class Report:
    """alarm: of one step, a distance of latents. led: the first visit. runs: the episodes by name,
    of the system and without its parts. policies: (successes, episodes with a violation) by name.
    """

    world: MazeWindow
    scene: Scene
    alarm: float
    led: Visit
    runs: dict[str, Acted]
    policies: dict[str, tuple[int, int]]


def led_around(learned: Learned, world: MazeWindow, seeds: Tensor, store: Path) -> Visit:
    """The first visit, remembered in a store."""
    torch.set_num_threads(1)
    return visit(world, world.reset(seeds), learned.models(world), LED, store, leads=True)


def measured(
    learned: Learned,
    world: MazeWindow,
    episodes: int,
    folder: Path,
    say: Callable[[str], None] = print,
) -> Report:
    """Run the system and everything beside it; the store of the first visit stays in the folder."""
    seeds = torch.tensor([episode_seed(COLLECTION, number) for number in range(episodes)])
    store = emptied(folder, "memory.store", "act.json")
    led = in_new_process(led_around, learned, world, seeds, store)
    models = learned.models(world)
    alarm = alarm_of(models.model, world, CALIBRATION)
    where = scene(world, begun(world, seeds, 0, led.positions), led.positions)
    every = {WHOLE: Parts()} | {f"without {part}": Parts(**{part: False}) for part in WITHOUT}
    runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, parts) in enumerate(every.items()):
            copied = Path(shutil.copy(store, Path(scratch) / str(number)))
            runs[name] = acted(world, where, models, parts, alarm, copied)
            say(line(name, runs[name]))
    policies = {}
    for name, policy in (("walk", walk), ("straight", straight), ("expert", expert)):
        success, inside = followed(world, where, policy)
        policies[name] = (int(success.sum()), int(inside.sum()))
    return Report(world, where, alarm, led, runs, policies)


def line(name: str, its: Acted) -> str:
    count = len(its.success)
    steps = float(its.rollout_steps.double().mean())
    words = f"{name:<28}{int(its.success.sum()):>6} of {count:<5}"
    return f"{words}{int(its.violations.sum()):>8}{steps:>14,.0f}"


def table(report: Report) -> str:
    """The results, in lines."""
    whole, count = report.runs[WHOLE], len(report.scene.state.seed)
    lines = [f"{'':<28}{'success':>11}{'violations':>12}{'model steps':>14}"]
    for name, (success, inside) in report.policies.items():
        lines.append(f"{name:<28}{success:>6} of {count:<5}{inside:>8}")
    lines += [line(name, its) for name, its in report.runs.items()]
    noticed, false = _alarms(whole)
    steps = whole.alarms.shape[1]
    lines.append(
        f"{WHOLE}: surprised in step {PUSHED}, when it is put elsewhere, in {noticed} of {count} "
        f"episodes, and in {false} of the {count * (steps - 1)} other steps; the shield changed "
        f"{int(whole.changed.sum())} of {count * steps} actions"
    )
    return "\n".join(lines)


def _alarms(its: Acted) -> tuple[int, int]:
    """How many episodes surprise in step PUSHED, and how many other steps do."""
    noticed = int(its.alarms[:, PUSHED - 1].sum())
    return noticed, int(its.alarms.sum()) - noticed


def verdict(report: Report) -> list[str]:
    """A sentence for each thing that the system or one of its parts should do and does not."""
    count, failed = len(report.scene.state.seed), []
    whole = report.runs[WHOLE]
    success = int(whole.success.sum())
    if success < LEAST * count:
        failed.append(f"{WHOLE}: {success} of {count}, takes {LEAST:.0%}")
    for name in ("without memory", "without surprise", "without levels"):
        without = int(report.runs[name].success.sum())
        if without > success - LESS * count:
            failed.append(f"{name}: {without} of {count}, takes {LESS:.0%} less than {success}")
    for name, its in report.runs.items():
        broken = int(its.violations.sum())
        if name == "without shield" and broken < LESS * count:
            failed.append(f"{name}: {broken} violations, takes {LESS:.0%}: the zones are not met")
        if name != "without shield" and broken:
            failed.append(f"{name}: {broken} episodes with a violation, takes none")
    return failed


def write(report: Report, folder: Path) -> None:
    """Write act.json."""
    noticed, false = _alarms(report.runs[WHOLE])
    contents = {
        "alarm": report.alarm,
        "noticed": noticed,
        "false_alarms": false,
        "policies": report.policies,
        "runs": {
            name: listed(its, "success", "rollout_steps", "violations")
            for name, its in report.runs.items()
        },
    }
    output.replace_json(folder / "act.json", contents)
