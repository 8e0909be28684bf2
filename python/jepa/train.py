"""The training loop of any method: shuffled batches, AdamW, warm-up and a cosine to zero."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Schedule:
    """learning_rate: the highest, reached after `warmup` of the steps; weight_decay: AdamW's."""

    steps: int
    learning_rate: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 1e-4

    def rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class History:
    """losses: one a step; seconds: the whole loop's."""

    losses: list[float]
    seconds: float


class Trainer:
    """One method, its optimizer and its random state; `step` is the whole of a training step."""

    def __init__(self, method: nn.Module, schedule: Schedule, device: torch.device, seed: int):
        self.method = method.to(device).train()
        self.schedule = schedule
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.optimizer = torch.optim.AdamW(
            method.parameters(), lr=schedule.rate(0), weight_decay=schedule.weight_decay
        )
        self.taken = 0

    def step(self, images: Tensor) -> Tensor:
        """The loss of this batch before the update; not waited for on an asynchronous device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.taken)
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.method(images, self.generator)
        loss.backward()
        self.optimizer.step()
        self.taken += 1
        return loss.detach()


def batches(images: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Without end: every epoch in a new order, the incomplete last batch dropped."""
    if not 2 <= batch <= len(images):
        raise ValueError(f"batch: got {batch}, takes 2 to {len(images)} (the training images)")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for index in order[: len(order) // batch * batch].split(batch):
            yield images[index]


def progress(total: int, label: str, unit: str = "step") -> tqdm:
    """A bar for a terminal of 100 columns; slower to redraw where it is written to a file."""
    interval = 0.1 if sys.stderr.isatty() else 5.0
    return tqdm(total=total, desc=f"{label:<22}", unit=unit, ncols=100, mininterval=interval)


def fit(trainer: Trainer, images: Tensor, batch: int, seed: int, label: str) -> History:
    """Take the schedule's steps over images: [N, C, H, W], on the trainer's device."""
    source = batches(images, batch, seed)
    losses: list[Tensor] = []
    start = time.perf_counter()
    with progress(trainer.schedule.steps, label) as bar:
        for step in range(trainer.schedule.steps):
            losses.append(trainer.step(next(source)))
            if step % 10 == 0 or step == trainer.schedule.steps - 1:
                bar.set_postfix(loss=f"{losses[-1].item():.3f}", refresh=False)
            bar.update()
    values = torch.stack(losses).tolist()
    seconds = time.perf_counter() - start
    for step, value in enumerate(values):
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {step} is {value}: the training diverged")
    return History(values, seconds)
