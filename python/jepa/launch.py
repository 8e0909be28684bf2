"""From a configuration to a trained run: data, method, ranks, logging."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa import (
    build,
    checkpoint,
    config,
    data,
    ending,
    history,
    locking,
    monitor,
    output,
    parallel,
    stopping,
    stored,
)
from jepa.config import Config
from jepa.source import Clips, ClipSource, ImageSource
from jepa.trainer import Diverged, Ranks, Trainer, bfloat16_is_slow


def images(settings: Config) -> tuple[Any, Any]:
    """(training, held out) of a run on images."""
    given, seed = settings.data, settings.seed
    if given.kind == "digits":
        found = data.digits()
        return data.split(found if given.size == 8 else data.resized(found, given.size), seed)
    assert given.path is not None
    if given.kind == "torchvision":
        assert given.name is not None
        return stored.torchvision(given.name, given.path, given.size, given.download)
    whole = _stored(given, given.path)
    if given.test is not None:
        held_out = _stored(given, given.test)
        if held_out.classes != whole.classes:
            raise ValueError(
                f"data.test: {given.test} has the classes {held_out.classes}, takes data.path's "
                f"{whole.classes}"
            )
        return whole, held_out
    return data.split(whole, seed) if whole.classes else data.split_blind(whole, seed)


def _stored(given: config.Data, path: Path) -> stored.Stored:
    folder = given.kind == "images"
    found = stored.Folder(path) if folder else stored.Shards(path, given.limits)
    return stored.stored(path.name, found, given.size, given.limits)


def source(settings: Config) -> Any:
    batch, seed, workers = settings.training.batch, settings.seed, settings.data.workers
    if not settings.is_video:
        # I-JEPA's masks are drawn apart from the images, so a rank reads its own alone.
        whole = settings.method != "ijepa"
        return ImageSource(images(settings)[0], batch, seed, workers, whole)
    from jepa import videos

    clips = Clips(videos.of(settings), settings.data.frames, settings.data.stride)
    return ClipSource(clips, batch, seed, workers)


@contextmanager
def ranks(settings: Config) -> Iterator[Ranks]:
    """torchrun's processes, or those of the caller's process group; alone without either."""
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if "RANK" not in os.environ:
        yield Ranks()
        return
    cuda = settings.training.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # A model that outlives its process group can hang when it goes.
        gc.collect()
        dist.destroy_process_group()


def in_turn(own: Ranks, make: Callable[[], Any]) -> Any:
    """make() on rank 0, then on all others at once: what writes files finds them written."""
    if own.ranks == 1:
        return make()
    # Of its own, for simulating videos may take longer than other collectives wait.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    found = make() if own.rank == 0 else None
    dist.barrier(group)
    dist.destroy_process_group(group)
    return make() if found is None else found


class Spread:
    """How a fixed batch's features are spread, at the steps that are logged."""

    def __init__(self, settings: Config, method: nn.Module, found: Any) -> None:
        self.settings, self.method = settings.training, method
        self.probe = found.sample(32 if settings.is_video else 256)

    def due(self, step: int) -> bool:
        return step % self.settings.log_every == 0 or step == self.settings.steps

    def __call__(self, step: int) -> monitor.Spread | None:
        if not self.due(step):
            return None
        return monitor.spread(features(self.method, self.probe))


class Log:
    """A progress line with throughput and time left, TensorBoard, and metrics.jsonl."""

    def __init__(self, settings: Config, folder: Path, spread: Spread, step: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )  # fmt: skip

        self.settings, self.spread = settings, spread
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self.task = self.bar.add_task(
            f"{settings.method}, {settings.kernels}", total=settings.training.steps, figures=""
        )
        self.path = folder / history.NAME
        history.take_up(self.path, step)
        with output.writing(self.path):
            self.file = self.path.open("a")
        self.board = folder / "tensorboard"
        self.writer = _tensorboard(self.board, step)
        self.since, self.samples = time.perf_counter(), 0

    def __enter__(self) -> Log:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        with output.writing(self.path):
            self.file.close()
        if self.writer is not None:
            with output.writing(self.board):
                self.writer.close()

    def __call__(self, step: int, loss: float, seconds: float) -> None:
        self.samples += self.settings.training.batch
        row: dict[str, Any] = {"step": step, "loss": loss, "seconds": seconds}
        if self.spread.due(step):
            rate = self.samples / (time.perf_counter() - self.since)
            row |= {"samples_per_second": rate, **self._collapse(step)}
            self.bar.update(self.task, figures=f"loss {loss:.4f}  {rate:.0f} samples/s")
        self.bar.update(self.task, completed=step)
        if not self.console.is_terminal and step % max(1, self.settings.training.steps // 10) == 0:
            self.console.print(f"step {step} of {self.settings.training.steps}, loss {loss:.4f}")
        with output.writing(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.writer is not None:
            with output.writing(self.board):
                for name, value in row.items():
                    if name != "step":
                        self.writer.add_scalar(name, value, step)

    def _collapse(self, step: int) -> dict[str, float]:
        found = self.spread(step)
        if found is None:
            return {}
        for warning in found.warnings():
            self.console.print(f"[yellow]{warning}[/yellow]")
        return {
            "effective_rank": found.effective_rank,
            "std": found.std,
            "correlation": found.correlation,
        }


def _tensorboard(folder: Path, step: int) -> Any:
    """Told to forget what a killed run wrote after the step that this one goes on from."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    with output.writing(folder):
        return SummaryWriter(str(folder), purge_step=step + 1)


@torch.no_grad()
def features(method: nn.Module, samples: Tensor, batch: int = 256) -> Tensor:
    """[N, D] on the CPU, in evaluation mode; the mode is put back."""
    was, device = method.training, next(method.parameters()).device
    method.eval()
    try:
        return torch.cat(
            [method.features(part.to(device)).float().cpu() for part in samples.split(batch)]
        )
    finally:
        method.train(was)
        if parallel.is_sharded(method):
            method.reshard()  # which a backward pass would do


def train(settings: Config, folder: Path) -> int:
    """Trains, or goes on from the folder's newest checkpoint, to the last step, which it returns.

    Under torchrun on every rank: the folder is the same one for all.
    """
    with output.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with ranks(settings) as own, _alone(own, folder) as stop:
        return _train(settings, folder, own, stop)


@contextmanager
def _alone(own: Ranks, folder: Path) -> Iterator[stopping.Stop]:
    """The folder is locked, and the signals are ours where the run has one process."""
    stop = stopping.Stop()
    with locking.held(folder) if own.rank == 0 else nullcontext():
        try:
            with stop if own.ranks == 1 else nullcontext():
                yield stop
        except stopping.Stopped as stopped:
            raise stopping.Stopped(stopped.number, _how_to_go_on(folder)) from None


def _how_to_go_on(folder: Path) -> str:
    path = checkpoint.newest(folder / "checkpoints")
    if path is None:
        return "; it has no checkpoint yet, the same command starts it again"
    step = int(path.name.removeprefix("step_"))
    return f"; the same command goes on from step {step} ({path})"


def _train(settings: Config, folder: Path, own: Ranks, stop: stopping.Stop) -> int:
    """All that refers to the process group, so that nothing outlives it."""
    found = in_turn(own, lambda: source(settings))
    method = build.method(settings, found.channels).train()
    trainer = Trainer(settings, method, own, folder)
    step = trainer.resume()
    if own.rank == 0:
        described = json.dumps(config.describe(settings), indent=1)
        output.replace(folder / "config.json", described.encode())
        if step:
            print(f"going on from step {step}", file=sys.stderr)
        if settings.training.precision == "bfloat16" and bfloat16_is_slow(settings.training.device):
            print(
                "training.precision: this CPU has no instructions for bfloat16, which takes many "
                "times as long as float32 here; training.precision=float32 is the fast one",
                file=sys.stderr,
            )
    spread = Spread(settings, method, found)
    many = own.ranks > 1 and dist.is_torchelastic_launched()
    with ending.watched(trainer.checkpoints) if many else nullcontext():
        if own.rank == 0:
            with Log(settings, folder, spread, step) as log:
                trainer.fit(found, log, stop)
        else:
            # Shards give features only where every rank takes part.
            sharded = settings.training.parallel == "fsdp"
            trainer.fit(found, lambda step, *_: spread(step) if sharded else None)
    return trainer.step


def restore(folder: Path) -> tuple[Config, nn.Module, int]:
    """(configuration, trained method in evaluation mode, step) of the newest whole checkpoint."""
    found = checkpoint.newest_whole(folder / "checkpoints")
    if found is None:
        raise checkpoint.CheckpointError(f"{folder}: holds no checkpoint of a run")
    return _restored(*found[1])


def load(path: Path) -> tuple[Config, nn.Module, int]:
    """What `restore` gives, of one checkpoint."""
    return _restored(*checkpoint.load(path))


def _restored(
    tensors: dict[str, Tensor], step: int, state: dict[str, Any]
) -> tuple[Config, nn.Module, int]:
    settings = config.parse(state["config"])
    method = build.method(settings, state["channels"])
    own = {k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")}
    method.load_state_dict(own)
    return settings, method.eval(), step


__all__ = ["Diverged", "features", "images", "load", "restore", "source", "train"]
