"""How many training steps a part of the demo takes, so that it ends in ten minutes anywhere."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vicreg_jepa import config
from vicreg_jepa.compare import compare, timing
from vicreg_jepa.compare.memory import in_own_process
from vicreg_jepa.config import Config
from vicreg_jepa.distributed.ranks import Ranks
from vicreg_jepa.methods import build
from vicreg_jepa.training.trainer import Trainer

TIMED_STEPS = 3


def seconds_of_a_step(described: dict[str, Any]) -> float:
    """The median time of some steps, after two warm-up steps and without reading videos."""
    settings = config.parse(described)
    batch, channels = compare.batch_of(settings)
    with tempfile.TemporaryDirectory() as folder:
        method = build.method(settings, channels).train()
        trainer = Trainer(settings, method, Ranks(), Path(folder))
        action = {"step": lambda: trainer.take(batch)}
        seconds = timing.interleaved(action, trainer.device, rounds=TIMED_STEPS)["step"]
    return sorted(seconds)[TIMED_STEPS // 2]


def fitted(settings: Config, overrides: Sequence[str], most: float) -> Config:
    """The settings with at most as many steps as fit into `most` seconds on this machine, unless
    the overrides give the number of steps.
    """
    if any(words.startswith("training.steps=") for words in overrides):
        return settings
    return within(settings, in_own_process(seconds_of_a_step, config.describe(settings)), most)


def within(settings: Config, seconds: float, most: float) -> Config:
    """The settings with at most as many steps, of `seconds` each, as fit into `most` seconds."""
    steps = max(1, min(settings.training.steps, int(most / seconds)))
    if steps < settings.training.steps:
        print(
            f"a step takes {seconds:.2f} s on this machine: training {steps} steps instead of "
            f"{settings.training.steps}, about {most} s",
            file=sys.stderr,
        )
    values = config.describe(settings)
    return config.parse(values | {"training": values["training"] | {"steps": steps}})
