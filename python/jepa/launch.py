"""From a configuration to a trained run: data, method, ranks, logging."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa import build, checkpoint, config, data, monitor, stored
from jepa.config import Config
from jepa.source import Clips, ClipSource, ImageSource
from jepa.trainer import Diverged, Ranks, Trainer


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
    of = stored.Folder if given.kind == "images" else stored.Shards
    whole = stored.stored(given.path.name, of(given.path), given.size)
    if given.test is not None:
        held_out = stored.stored(given.test.name, of(given.test), given.size)
        if held_out.classes != whole.classes:
            raise ValueError(
                f"data.test: {given.test} has the classes {held_out.classes}, takes data.path's "
                f"{whole.classes}"
            )
        return whole, held_out
    return data.split(whole, seed) if whole.classes else data.split_blind(whole, seed)


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
    """torchrun's processes; alone where there is no torchrun."""
    if "RANK" not in os.environ:
        yield Ranks()
        return
    backend = "nccl" if settings.training.device.startswith("cuda") else "gloo"
    dist.init_process_group(f"cpu:gloo,cuda:{backend}" if backend == "nccl" else backend)
    try:
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class Log:
    """A progress line with throughput and time left, TensorBoard, and metrics.jsonl."""

    def __init__(self, settings: Config, folder: Path, probe: Tensor | None, method: Any) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )  # fmt: skip

        self.settings, self.method, self.probe = settings, method, probe
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self.task = self.bar.add_task(
            f"{settings.method}, {settings.kernels}", total=settings.training.steps, figures=""
        )
        self.file = (folder / "metrics.jsonl").open("a")
        self.writer = _tensorboard(folder)
        self.since, self.samples = time.perf_counter(), 0

    def __enter__(self) -> Log:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.file.close()
        if self.writer is not None:
            self.writer.close()

    def __call__(self, step: int, loss: float, seconds: float) -> None:
        self.samples += self.settings.training.batch
        row: dict[str, Any] = {"step": step, "loss": loss, "seconds": seconds}
        if step % self.settings.training.log_every == 0 or step == self.settings.training.steps:
            rate = self.samples / (time.perf_counter() - self.since)
            row |= {"samples_per_second": rate, **self._collapse()}
            self.bar.update(self.task, figures=f"loss {loss:.4f}  {rate:.0f} samples/s")
        self.bar.update(self.task, completed=step)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, step)

    def _collapse(self) -> dict[str, float]:
        """The spread of a fixed batch's features; a warning names what has collapsed."""
        if self.probe is None:
            return {}
        found = features(self.method, self.probe)
        spread = monitor.spread(found)
        for warning in spread.warnings():
            self.console.print(f"[yellow]{warning}[/yellow]")
        return {
            "effective_rank": spread.effective_rank,
            "std": spread.std,
            "correlation": spread.correlation,
        }


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


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


def train(settings: Config, folder: Path) -> Trainer:
    """Trains, or goes on from the folder's newest checkpoint, to the last step."""
    folder.mkdir(parents=True, exist_ok=True)
    with ranks(settings) as own:
        found = source(settings)
        method = build.method(settings, found.channels).train()
        trainer = Trainer(settings, method, own, folder)
        step = trainer.resume()
        if own.rank == 0:
            (folder / "config.json").write_text(json.dumps(config.describe(settings), indent=1))
            if step:
                print(f"going on from step {step}", file=sys.stderr)
        try:
            if own.rank != 0:
                trainer.fit(found, lambda *_: None)
            else:
                probe = found.sample(256) if isinstance(found, ImageSource) else None
                with Log(settings, folder, probe, method) as log:
                    trainer.fit(found, log)
        finally:
            trainer.release()
        return trainer


def restore(folder: Path) -> tuple[Config, nn.Module, int]:
    """(configuration, trained method in evaluation mode, step) of a run's newest checkpoint."""
    path = checkpoint.newest(folder / "checkpoints")
    if path is None:
        raise checkpoint.CheckpointError(f"{folder}: holds no checkpoint of a run")
    tensors, step, state = checkpoint.load(path)
    settings = config.parse(state["config"])
    method = build.method(settings, state["channels"])
    own = {k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")}
    method.load_state_dict(own)
    return settings, method.eval(), step


__all__ = ["Diverged", "features", "images", "restore", "source", "train"]
