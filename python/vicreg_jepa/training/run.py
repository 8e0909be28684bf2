"""Starts or resumes a run, and loads a trained method from a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from vicreg_jepa import config
from vicreg_jepa.config import Config
from vicreg_jepa.data import sources
from vicreg_jepa.distributed.launch import in_turn, ranks
from vicreg_jepa.distributed.ranks import Ranks
from vicreg_jepa.files import output
from vicreg_jepa.methods import build
from vicreg_jepa.places.place import Place
from vicreg_jepa.training import checkpoint, exported, locking, rank_failure, stopping
from vicreg_jepa.training.log import Log, SpreadMonitor
from vicreg_jepa.training.trainer import Trainer, bfloat16_is_slow

BELOW = "world"  # the method whose runs training.begin takes
PREPARED = 512  # frames that a method of trajectories is initialised from


def train(settings: Config, folder: Path) -> int:
    """Train to the last step, from the folder's newest checkpoint if there is one; return the step.

    Under torchrun every rank calls it, with the same folder.
    """
    with output.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with ranks(settings) as process, _alone(process, folder) as stop:
        return _train(settings, folder, process, stop)


@contextmanager
def _alone(process: Ranks, folder: Path) -> Iterator[stopping.Stop]:
    """Lock the folder; in a run of one process also handle the signals."""
    stop = stopping.Stop()
    with locking.held(folder) if process.rank == 0 else nullcontext():
        try:
            with stop if process.ranks == 1 else nullcontext():
                yield stop
        except stopping.Stopped as stopped:
            text = rank_failure.how_to_resume(folder / "checkpoints")
            raise stopping.Stopped(stopped.number, text) from None


def _train(settings: Config, folder: Path, process: Ranks, stop: stopping.Stop) -> int:
    """The part that uses the process group, in one function, so that no object outlives the
    group.
    """
    source = in_turn(process, lambda: sources.source(settings))
    method = build.method(settings, source.channels).train()
    if settings.is_of_trajectories:
        method.prepare(source.sample(PREPARED))
    trainer = Trainer(settings, method, process, folder, _place(settings, method, process, folder))
    step = trainer.resume()
    if not step and settings.training.begin is not None:
        _begin(settings, method)
    if process.rank == 0:
        described = json.dumps(config.describe(settings), indent=1)
        output.replace(folder / "config.json", described.encode())
        if step:
            print(f"resuming at step {step}", file=sys.stderr)
        if settings.training.precision == "bfloat16" and bfloat16_is_slow(settings.training.device):
            print(
                "training.precision: this CPU has no instructions for bfloat16, which takes many "
                "times as long as float32 here; training.precision=float32 is faster",
                file=sys.stderr,
            )
    spread = SpreadMonitor(settings, method, source)
    many = process.ranks > 1 and dist.is_torchelastic_launched()
    with rank_failure.watched(trainer.checkpoints, stop) if many else nullcontext():
        if process.rank == 0:
            with Log(settings, folder, spread, step) as log:
                trainer.fit(source, log, stop)
        else:
            # With shards every rank must take part in computing features.
            sharded = settings.training.parallel == "fsdp"
            trainer.fit(source, lambda step, *_: spread(step) if sharded else None, stop)
    return trainer.step


def _begin(settings: Config, method: nn.Module) -> None:
    """Give a method the world model of an earlier run on the same world."""
    folder = settings.training.begin
    assert folder is not None
    theirs, below, _ = restore(folder)
    if theirs.method != BELOW:
        raise ValueError(f"training.begin: {folder} trained {theirs.method}, takes {BELOW}")
    for name in ("kind", "path", "world", "settings", "size", "actions"):
        mine, its = getattr(settings.data, name), getattr(theirs.data, name)
        if mine != its:
            raise ValueError(f"data.{name}: got {mine!r}, takes that of {folder}, {its!r}")
    method.begin(below.state_dict())


def _place(settings: Config, method: nn.Module, process: Ranks, folder: Path) -> Place | None:
    if settings.places.meeting is None:
        return None
    if process.ranks > 1:
        raise ValueError(
            f"places.meeting: takes one process in each place, not {process.ranks} ranks"
        )
    return Place(settings, method, folder)


def restore(folder: Path) -> tuple[Config, nn.Module, int]:
    """Load (configuration, trained method in evaluation mode, step) from the newest intact
    checkpoint of a run's folder, or from a file of `vicreg-jepa export --format whole`.
    """
    if folder.is_file():
        return exported.method(folder)
    newest = checkpoint.newest_whole(folder / "checkpoints")
    if newest is None:
        raise checkpoint.CheckpointError(f"{folder}: holds no checkpoint of a run")
    return _restored(*newest[1])


def load(path: Path) -> tuple[Config, nn.Module, int]:
    """The same as `restore`, from one given checkpoint."""
    return _restored(*checkpoint.load(path))


def _restored(
    tensors: dict[str, Tensor], step: int, state: dict[str, Any]
) -> tuple[Config, nn.Module, int]:
    settings = config.parse(state["config"])
    method = build.method(settings, state["channels"])
    prefix = "method."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    method.load_state_dict(weights)
    return settings, method.eval(), step
