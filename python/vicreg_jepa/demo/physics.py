"""Trains a V-JEPA on physics videos for two minutes and draws its surprise at an impossible one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vicreg_jepa import config
from vicreg_jepa.compare.memory import in_own_process
from vicreg_jepa.config import Config
from vicreg_jepa.demo import steps
from vicreg_jepa.surprise import physics_test, report
from vicreg_jepa.training import trainer
from vicreg_jepa.training.run import restore, train

STEPS, VIDEOS = 700, 2000
# Limit of the training. A slow machine does fewer steps, so that the demo ends in ten minutes.
SECONDS = 210
PROPERTY = "permanence"
QUADRUPLETS = 10


def settings(output: Path, overrides: Sequence[str]) -> Config:
    defaults = [
        f"training.steps={STEPS}",
        f"data.videos={VIDEOS}",
        f"data.path={json.dumps(str(output / 'physics_videos'))}",
    ]
    chosen = config.load("vjepa_causal_physics", config.layered(defaults, overrides))
    if trainer.bfloat16_is_slow(chosen.training.device):
        defaults.append("training.precision=float32")
        chosen = config.load("vjepa_causal_physics", config.layered(defaults, overrides))
        if chosen.training.precision == "float32":
            print("this CPU has no instructions for bfloat16: training in float32", file=sys.stderr)
    return steps.fitted(chosen, overrides, SECONDS)


def run(settings: Config, output: Path) -> None:
    folder = output / "vjepa_causal_physics"
    in_own_process(train, settings, folder)
    accuracy = in_own_process(_surprise, folder, output)
    picture, moving = (output / f"{PROPERTY}.{kind}" for kind in ("png", "gif"))
    print(f"surprise where a thing vanishes or appears: {picture}, {moving}")
    print(
        f"{PROPERTY}: {100 * accuracy:.0f} % of {QUADRUPLETS} quadruplets told apart after "
        f"{settings.training.steps} steps (chance is 50 %); all properties: "
        f"vicreg-jepa surprise {folder}"
    )


def _surprise(folder: Path, output: Path) -> float:
    """Draws one pair; the relative accuracy over a few quadruplets."""
    settings, method, _ = restore(folder)
    report.draw_quadruplet(method, PROPERTY, output, stride=settings.data.stride)
    surprise_of = physics_test.of_method(method, settings.data.stride)
    clips = physics_test.quadruplets(PROPERTY, QUADRUPLETS)
    return physics_test.scores(surprise_of, clips, PROPERTY)["mean"].accuracy
