"""`vicreg-jepa compare`: steps per second and peak memory of the fused ops and the reference, on
the same batches and masks. The steps alternate in one process; memory is measured in a separate
process for each.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vicreg_jepa.compare import memory, timing
from vicreg_jepa.config import Config, describe, parse
from vicreg_jepa.data import sources
from vicreg_jepa.distributed.ranks import Ranks
from vicreg_jepa.methods import build
from vicreg_jepa.training.trainer import Trainer

NAMES = ("fused", "reference")


@dataclass(frozen=True)
class Compared:
    """The comparison of one method. seconds: median time of a step; ratio: median of the rounds'
    ratios, reference over fused; extra_bytes: the peak of a step above the memory held before it;
    apart: the largest relative difference between the losses of the same steps.
    """

    method: str
    seconds: dict[str, float]
    ratio: float
    extra_bytes: dict[str, int]
    apart: float


def with_kernels(settings: Config, name: str) -> Config:
    """The same settings with kernels=`name`; `backend` applies only to the fused ops."""
    values = describe(settings) | {"kernels": name}
    if name == "reference":
        values["backend"] = None
    return parse(values)


def _trainer(settings: Config, name: str, folder: Path, channels: int) -> Trainer:
    settings = with_kernels(settings, name)
    return Trainer(settings, build.method(settings, channels), Ranks(), folder)


def batch_of(settings: Config) -> tuple[Any, int]:
    """A batch for a step, and its channels. It is random, because the speed does not depend on the
    contents of images; trajectories are those of the run's first step.
    """
    if settings.is_of_trajectories:
        source = sources.source(settings)
        return next(source.batches(0, Ranks().share)), source.channels
    data, generator = settings.data, torch.Generator().manual_seed(settings.seed)
    shape: tuple[int, ...] = (settings.training.batch, 3, data.size, data.size)
    if settings.is_video:
        shape = (*shape[:2], data.frames, *shape[2:])
    if data.kind == "digits":
        shape = (shape[0], 1, *shape[2:])
    return torch.rand(shape, generator=generator), shape[1]


def _memory(values: dict[str, Any], name: str) -> int:
    settings = parse(values)
    batch, channels = batch_of(settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(settings, name, Path(folder), channels)
        trainer.take(batch)  # for the optimizer's state, and what torch loads once
        peak = memory.PeakMemory(trainer.device)
        trainer.take(batch)
        return peak.extra()


def compare(settings: Config, rounds: int) -> Compared:
    batch, channels = batch_of(settings)
    losses: dict[str, list[float]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {n: _trainer(settings, n, Path(folder), channels) for n in NAMES}

        def step(name: str) -> None:
            losses[name].append(float(trainers[name].take(batch)))

        actions = {name: lambda name=name: step(name) for name in NAMES}
        seconds = timing.interleaved(actions, trainers["fused"].device, rounds=rounds)
    pairs = zip(losses["fused"], losses["reference"], strict=True)
    return Compared(
        settings.method,
        {name: median(each) for name, each in seconds.items()},
        timing.median_ratio(seconds["reference"], seconds["fused"]),
        {n: memory.in_own_process(_memory, describe(settings), n) for n in NAMES},
        max(abs(a - b) / abs(b) for a, b in pairs),
    )


def table(comparisons: list[Compared]) -> str:
    lines = [
        f"{'method':<14}{'fused':>12}{'reference':>12}{'ratio':>8}"
        f"{'MiB':>8}{'MiB ref':>9}{'apart':>10}"
    ]
    for one in comparisons:
        rates = [f"{1 / one.seconds[name]:>9.2f}/s" for name in NAMES]
        extra = [one.extra_bytes[name] / 2**20 for name in NAMES]
        lines.append(
            f"{one.method:<14}{rates[0]:>12}{rates[1]:>12}{one.ratio:>7.2f}x"
            f"{extra[0]:>8.0f}{extra[1]:>9.0f}{one.apart:>10.1e}"
        )
    return "\n".join(lines)
