"""The output of a running training: a progress line, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch import nn

from vicreg_jepa.config import Config
from vicreg_jepa.evaluation import collapse
from vicreg_jepa.evaluation.features import features
from vicreg_jepa.files import output
from vicreg_jepa.training import metrics_file


class SpreadMonitor:
    """Computes the spread (rank, deviations) of a fixed batch's features at the steps that are
    logged.
    """

    def __init__(self, settings: Config, method: nn.Module, source: Any) -> None:
        self.settings, self.method = settings.training, method
        self.probe = source.sample(32 if settings.is_video else 256)

    def due(self, step: int) -> bool:
        return step % self.settings.log_every == 0 or step == self.settings.steps

    def __call__(self, step: int) -> collapse.Spread | None:
        if not self.due(step):
            return None
        return collapse.spread(features(self.method, self.probe))


class Log:
    """A progress line with throughput and time left, TensorBoard, and metrics.jsonl."""

    def __init__(self, settings: Config, folder: Path, spread: SpreadMonitor, step: int) -> None:
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
        self.path = folder / metrics_file.NAME
        metrics_file.take_up(self.path, step)
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
        spread = self.spread(step)
        if spread is None:
            return {}
        for warning in spread.warnings():
            self.console.print(f"[yellow]{warning}[/yellow]")
        return {
            "effective_rank": spread.effective_rank,
            "std": spread.std,
            "correlation": spread.correlation,
        }


def _tensorboard(folder: Path, step: int) -> Any:
    """A TensorBoard writer that drops the rows a killed run wrote after the step of its
    checkpoint.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    with output.writing(folder):
        return SummaryWriter(str(folder), purge_step=step + 1)
