"""What tests/trainer/test_recall.py does before a restart, in a process that ends:
`python -m tests.trainer.recall_processes STORE MAZES STEPS` leads an agent through mazes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from vicreg_jepa import pretrained
from vicreg_jepa.recall.places import TruePlaces
from vicreg_jepa.recall.report import COLLECTION
from vicreg_jepa.recall.visits import Models, visit
from vicreg_jepa.training.run import restore
from vicreg_jepa.worlds.episodes import episode_seed
from vicreg_jepa.worlds.window import MazeWindow

WORLD = MazeWindow()
MATCH = 5.1  # as report.match_of gives


def models() -> Models:
    """The encoder of the package; the planner has the true dynamics, which needs no fit."""
    method = restore(pretrained.path("recall"))[1]
    return Models(method, TruePlaces(WORLD), MATCH, "the package's")


def seeds(count: int) -> torch.Tensor:
    return torch.tensor([episode_seed(COLLECTION, number) for number in range(count)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    store, mazes, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    led = visit(WORLD, WORLD.reset(seeds(mazes)), models(), steps, store, leads=True)
    torch.save(led.positions, f"{store}.positions")  # where the goals are drawn from
