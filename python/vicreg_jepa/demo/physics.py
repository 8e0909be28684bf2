"""Trains a V-JEPA on physics videos for two minutes and draws its surprise at an impossible one."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vicreg_jepa import config
from vicreg_jepa.compare import compare, timing
from vicreg_jepa.compare.memory import in_own_process
from vicreg_jepa.config import Config
from vicreg_jepa.methods import build
from vicreg_jepa.surprise import physics_test, report
from vicreg_jepa.training import trainer
from vicreg_jepa.training.run import restore, train

STEPS, VIDEOS = 700, 2000
# Limit of the training. A slow machine does fewer steps, so that the demo ends in ten minutes.
SECONDS = 210
TIMED_STEPS = 3
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
    if any(words.startswith("training.steps=") for words in overrides):
        return chosen
    return fitted(chosen, in_own_process(seconds_of_a_step, config.describe(chosen)))


def seconds_of_a_step(described: dict[str, Any]) -> float:
    """The median time of some steps, after two warm-up steps and without reading videos."""
    settings = config.parse(described)
    batch, channels = compare.batch_of(settings)
    with tempfile.TemporaryDirectory() as folder:
        method = build.method(settings, channels).train()
        steps = trainer.Trainer(settings, method, trainer.Ranks(), Path(folder))
        action = {"step": lambda: steps.take(batch)}
        seconds = timing.interleaved(action, steps.device, rounds=TIMED_STEPS)["step"]
    return sorted(seconds)[TIMED_STEPS // 2]


def fitted(settings: Config, seconds: float) -> Config:
    """The settings with at most as many steps, of `seconds` each, as fit into SECONDS."""
    steps = max(1, min(settings.training.steps, int(SECONDS / seconds)))
    if steps < settings.training.steps:
        print(
            f"a step takes {seconds:.2f} s on this machine: training {steps} steps instead of "
            f"{settings.training.steps}, about {SECONDS} s",
            file=sys.stderr,
        )
    values = config.describe(settings)
    return config.parse(values | {"training": values["training"] | {"steps": steps}})


def run(settings: Config, output: Path) -> None:
    folder = output / "vjepa_causal_physics"
    in_own_process(_train, settings, folder)
    accuracy = in_own_process(_surprise, folder, output)
    picture, moving = (output / f"{PROPERTY}.{kind}" for kind in ("png", "gif"))
    print(f"surprise where a thing vanishes or appears: {picture}, {moving}")
    print(
        f"{PROPERTY}: {100 * accuracy:.0f} % of {QUADRUPLETS} quadruplets told apart after "
        f"{settings.training.steps} steps (chance is 50 %); all properties: "
        f"vicreg-jepa surprise {folder}"
    )


def _train(settings: Config, folder: Path) -> None:
    train(settings, folder)


def _surprise(folder: Path, output: Path) -> float:
    """Draws one pair; the relative accuracy over a few quadruplets."""
    settings, method, _ = restore(folder)
    report.draw_quadruplet(method, PROPERTY, output, stride=settings.data.stride)
    surprise_of = physics_test.of_method(method, settings.data.stride)
    clips = physics_test.quadruplets(PROPERTY, QUADRUPLETS)
    return physics_test.scores(surprise_of, clips, PROPERTY)["mean"].accuracy
