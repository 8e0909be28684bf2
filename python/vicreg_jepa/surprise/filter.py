"""Do embeddings leave out what cannot be predicted? Trains the arms of the comparison on physics
videos of several strengths of noise, tests their surprise, and probes what they hold.

    python -m vicreg_jepa.surprise.filter --output runs/filter --strengths 0 0.5 --steps 700

Every arm has the same network, steps and videos. A cell is an arm, a strength and a seed; a stopped
command resumes, and one with more cells keeps those that are there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vicreg_jepa import config
from vicreg_jepa.cli_options import integer, reported
from vicreg_jepa.files import output
from vicreg_jepa.methods import build
from vicreg_jepa.physics import PROPERTIES
from vicreg_jepa.surprise import filter_report
from vicreg_jepa.surprise.arms import ARMS, STRENGTHS
from vicreg_jepa.training.run import restore, train


@dataclass(frozen=True)
class Plan:
    """What every cell shares. quadruplets: per property and place of the exchange; videos: of the
    probes; overrides: settings of all trainings.
    """

    steps: int
    quadruplets: int
    videos: int
    overrides: tuple[str, ...] = ()

    def settings(self, arm: str, strength: float, seed: int, root: Path) -> config.Config:
        recipe, own = ARMS[arm]
        words = [f"training.steps={self.steps}", f"data.noise={strength}", f"seed={seed}"]
        words.append(f"data.path={json.dumps(str(root / f'videos-{seed}'))}")
        return config.load(recipe, config.layered([*words, *own], self.overrides))


def run(
    root: Path, arms: Sequence[str], strengths: Sequence[float], seeds: Sequence[int], plan: Plan
) -> None:
    """Train and measure the cells, and draw the table and the figure after each."""
    for seed in seeds:
        for strength in strengths:
            for arm in arms:
                folder = root / f"{arm}-{strength:g}-{seed}"
                settings = plan.settings(arm, strength, seed, root)
                train(settings, folder)
                _measured(folder, arm, strength, seed, plan)
                print(filter_report.write(root), flush=True)


def _measured(folder: Path, arm: str, strength: float, seed: int, plan: Plan) -> None:
    """Write the cell's filter.json. Raises ValueError if it was measured under another plan."""
    path = folder / "filter.json"
    planned = json.loads(json.dumps(asdict(plan)))
    if path.exists():
        there = json.loads(path.read_text())["plan"]
        for name, value in planned.items():
            if there[name] != value:
                raise ValueError(
                    f"{name}: got {value!r}, but {folder} was measured with {there[name]!r}; takes "
                    "the same, or another output folder"
                )
        return
    settings, method, step = restore(folder)
    untrained = build.method(settings, method.channels).eval()
    cell = {"plan": planned, "arm": arm, "strength": strength, "seed": seed, "step": step}
    cell |= surprise({"surprise": method, "untrained": untrained}, settings, plan.quadruplets)
    cell |= {"probes": probes({"model": method, "untrained": untrained}, settings, plan.videos)}
    output.replace(path, json.dumps(cell, indent=1).encode())


def surprise(methods: dict[str, Any], settings: config.Config, count: int) -> dict[str, Any]:
    """{name of a method: {place: {property: {accuracy, auroc}}}} of the mean surprise."""
    from vicreg_jepa.surprise import physics_test

    stride, noise = settings.data.stride, settings.data.noise
    ways = {name: physics_test.of_method(method, stride) for name, method in methods.items()}
    result: dict[str, Any] = {name: {place: {} for place in physics_test.PLACES} for name in ways}
    for place, hidden in physics_test.PLACES.items():
        for property in PROPERTIES:
            clips = physics_test.quadruplets(property, count, 0, hidden, noise)
            for name, surprise_of in ways.items():
                score = physics_test.scores(surprise_of, clips, property)["mean"]
                kept = {"accuracy": score.accuracy, "auroc": score.auroc}
                result[name][place][property] = kept
    return result


def probes(methods: dict[str, Any], settings: config.Config, count: int) -> dict[str, Any]:
    """{model: {fact: score}}, also of the pixels themselves."""
    from vicreg_jepa.evaluation import physics_probe

    videos = physics_probe.seen(count, settings.data.noise, settings.data.stride)
    readers: dict[str, Callable] = {name: method.tokens for name, method in methods.items()}
    readers["pixels"] = physics_probe.pixels
    return {name: physics_probe.scores(tokens, videos) for name, tokens in readers.items()}


def _strength(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes a number from 0 to 1")
    return value


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m vicreg_jepa.surprise.filter",
        description="Compare predicting embeddings with predicting pixels where the world is full "
        "of what nobody can predict. A stopped command resumes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("overrides", nargs="*", metavar="key=value", help="settings of every training")
    add("--output", type=Path, default=Path("runs/filter"), help="a folder")
    add("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    add("--strengths", nargs="+", type=_strength, default=STRENGTHS, metavar="STRENGTH")
    add("--seeds", nargs="+", type=integer(0), default=(0, 1, 2), metavar="SEED")
    add("--steps", type=integer(1), default=5500, help="of every training")
    add("--quadruplets", type=integer(1), default=25, help="per property and place")
    add("--videos", type=integer(40), default=2000, help="of the probes, a quarter held out")
    return options


def main(arguments: list[str] | None = None) -> int:
    chosen = parser().parse_intermixed_args(arguments)
    plan = Plan(chosen.steps, chosen.quadruplets, chosen.videos, tuple(chosen.overrides))

    def work() -> int:
        run(chosen.output, chosen.arms, chosen.strengths, chosen.seeds, plan)
        return 0

    return reported("filter", work)


if __name__ == "__main__":
    raise SystemExit(main())
