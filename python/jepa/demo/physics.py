"""A V-JEPA trained on physics videos for two minutes, and its surprise at an impossible one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jepa import config, intuition, launch, surprise_report
from jepa.config import Config
from jepa.memory import in_own_process

STEPS, VIDEOS = 700, 2000
PROPERTY = "permanence"
QUADRUPLETS = 10


def settings(output: Path, overrides: Sequence[str]) -> Config:
    own = (
        f"training.steps={STEPS}",
        f"data.videos={VIDEOS}",
        f"data.path={json.dumps(str(output / 'physics_videos'))}",
    )
    return config.load("vjepa_causal_physics", config.layered(own, overrides))


def run(made: Config, output: Path) -> None:
    folder = output / "vjepa_causal_physics"
    in_own_process(_train, made, folder)
    accuracy = in_own_process(_surprise, folder, output)
    picture, moving = (output / f"{PROPERTY}.{kind}" for kind in ("png", "gif"))
    print(f"surprise where a thing vanishes or appears: {picture}, {moving}")
    print(
        f"{PROPERTY}: {100 * accuracy:.0f} % of {QUADRUPLETS} quadruplets told apart after "
        f"{made.training.steps} steps (chance is 50 %); all properties: jepa surprise {folder}"
    )


def _train(made: Config, folder: Path) -> None:
    launch.train(made, folder)


def _surprise(folder: Path, output: Path) -> float:
    """Draws one pair; the relative accuracy over a few quadruplets."""
    made, method, _ = launch.restore(folder)
    surprise_report.draw_quadruplet(method, PROPERTY, output, stride=made.data.stride)
    surprise_of = intuition.of_method(method, made.data.stride)
    clips = intuition.quadruplets(PROPERTY, QUADRUPLETS)
    return intuition.scores(surprise_of, clips, PROPERTY)["mean"].accuracy
