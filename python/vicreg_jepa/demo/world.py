"""Trains a world model on two rooms for two minutes and plans with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vicreg_jepa import config
from vicreg_jepa.compare.memory import in_own_process
from vicreg_jepa.config import Config
from vicreg_jepa.data.trajectories import world_of
from vicreg_jepa.demo import steps
from vicreg_jepa.planning import figure, report
from vicreg_jepa.training.run import restore, train

STEPS = 1000
SECONDS = 130  # the limit of the training; a slow machine does fewer steps
EPISODES = 20


def settings(output: Path, overrides: Sequence[str]) -> Config:
    words = config.layered([f"training.steps={STEPS}"], overrides)
    chosen = config.load("world_two_rooms", words)
    world_of(chosen)
    return steps.fitted(chosen, overrides, SECONDS)


def run(settings: Config, output: Path) -> None:
    folder = output / "world_two_rooms"
    in_own_process(train, settings, folder)
    table = in_own_process(_planned, folder, output)
    print(table)
    print(f"planned episodes: {output / 'plan.png'}, {output / 'plan.gif'}")
    print(f"the whole recipe takes 5000 steps: vicreg-jepa train world_two_rooms --output {folder}")


def _planned(folder: Path, output: Path) -> str:
    """Draws episodes; the table of successes."""
    settings, method, step = restore(folder)
    world, planner, seeds = world_of(settings), report.planner(), report.seeds_of(EPISODES)
    runs = [(f"world model, step {step}", method)]
    rows, result = report.measured(runs, world, planner, EPISODES)
    figure.draw(method, world, seeds, result, planner.interval, output / "plan.png")
    longest = figure.chosen(result)[-1]
    figure.animate(method, world, seeds, result, longest, planner.interval, output / "plan.gif")
    return report.table(rows)
