"""A V-JEPA trained on physics videos for two minutes, and its surprise at an impossible one."""

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
# The training's limit. A slow machine takes fewer steps, so that the demo ends in ten minutes.
SECONDS = 210
TIMED_STEPS = 3
PROPERTY = "permanence"
QUADRUPLETS = 10


def settings(output: Path, overrides: Sequence[str]) -> Config:
    own = [
        f"training.steps={STEPS}",
        f"data.videos={VIDEOS}",
        f"data.path={json.dumps(str(output / 'physics_videos'))}",
    ]
    if trainer.bfloat16_is_slow("cpu"):
        own.append("training.precision=float32")
    made = config.load("vjepa_causal_physics", config.layered(own, overrides))
    if any(words.startswith("training.steps=") for words in overrides):
        return made
    return fitted(made, in_own_process(seconds_of_a_step, config.describe(made)))


def seconds_of_a_step(described: dict[str, Any]) -> float:
    """The median of some steps after two that warm up, without reading the videos."""
    made = config.parse(described)
    batch = compare.batch_of(made)
    with tempfile.TemporaryDirectory() as folder:
        method = build.method(made, batch.shape[1]).train()
        steps = trainer.Trainer(made, method, trainer.Ranks(), Path(folder))
        action = {"step": lambda: steps.take(batch)}
        seconds = timing.interleaved(action, steps.device, rounds=TIMED_STEPS)["step"]
    return sorted(seconds)[TIMED_STEPS // 2]


def fitted(made: Config, seconds: float) -> Config:
    """`made` with as many steps as SECONDS hold, at most those that it has; seconds: of a step."""
    steps = max(1, min(made.training.steps, int(SECONDS / seconds)))
    if steps < made.training.steps:
        print(
            f"a step takes {seconds:.2f} s on this machine: training {steps} steps in place of "
            f"{made.training.steps}, about {SECONDS} s",
            file=sys.stderr,
        )
    values = config.describe(made)
    return config.parse(values | {"training": values["training"] | {"steps": steps}})


def run(made: Config, output: Path) -> None:
    folder = output / "vjepa_causal_physics"
    in_own_process(_train, made, folder)
    accuracy = in_own_process(_surprise, folder, output)
    picture, moving = (output / f"{PROPERTY}.{kind}" for kind in ("png", "gif"))
    print(f"surprise where a thing vanishes or appears: {picture}, {moving}")
    print(
        f"{PROPERTY}: {100 * accuracy:.0f} % of {QUADRUPLETS} quadruplets told apart after "
        f"{made.training.steps} steps (chance is 50 %); all properties: "
        f"vicreg-jepa surprise {folder}"
    )


def _train(made: Config, folder: Path) -> None:
    train(made, folder)


def _surprise(folder: Path, output: Path) -> float:
    """Draws one pair; the relative accuracy over a few quadruplets."""
    made, method, _ = restore(folder)
    report.draw_quadruplet(method, PROPERTY, output, stride=made.data.stride)
    surprise_of = physics_test.of_method(method, made.data.stride)
    clips = physics_test.quadruplets(PROPERTY, QUADRUPLETS)
    return physics_test.scores(surprise_of, clips, PROPERTY)["mean"].accuracy
