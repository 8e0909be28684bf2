"""One training run by its settings, and what of it is measured in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jepa import data, train
from jepa.memory import PeakMemory, resident_peak
from jepa.vicreg import Loss, VICReg, build, loss_named

MOMENTS = 6


@dataclass(frozen=True)
class Settings:
    """What a run depends on, apart from the loss's name.

    dim, hidden: the expander's outer and inner width; images: a folder, None for digits.
    """

    steps: int
    batch: int
    dim: int
    hidden: int
    seed: int
    backend: str | None
    device: str
    images: str | None
    image_size: int

    def sets(self) -> tuple[data.Images, data.Images]:
        """(training, test)."""
        if self.images is None:
            return data.split(data.digits(), self.seed)
        return data.split(data.image_folder(self.images, self.image_size), self.seed)

    def method(self, loss: Loss, channels: int) -> VICReg:
        return build(channels, self.dim, self.hidden, loss, self.seed)

    def trainer(self, loss: Loss, channels: int) -> train.Trainer:
        method = self.method(loss, channels)
        schedule = train.Schedule(self.steps)
        return train.Trainer(method, schedule, torch.device(self.device), self.seed)


@dataclass(frozen=True)
class Outcome:
    """losses: one a step; seconds: of the loop; bytes at the peak: all, and above the start."""

    losses: list[float]
    seconds: float
    peak_bytes: int
    extra_bytes: int


class Recorder:
    """A loss that also writes the embeddings of a few steps, evenly spread, to `folder`."""

    def __init__(self, loss: Loss, steps: int, folder: Path):
        self.loss = loss
        self.folder = folder
        self.wanted = set(torch.linspace(0, steps - 1, MOMENTS).round().int().tolist())
        self.step = 0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if self.step in self.wanted:
            torch.save((x.detach(), y.detach()), self.folder / f"step{self.step:06d}.pt")
        self.step += 1
        return self.loss(x, y)


def moments(folder: Path) -> list[Path]:
    """The recorded embeddings, each a pair [N, D], in the order of the steps."""
    return sorted(folder.glob("step*.pt"))


def train_run(settings: Settings, name: str, encoder_file: Path, folder: Path) -> Outcome:
    """Train with the loss called `name`; leave the encoder's weights and some embeddings."""
    make_repeatable()
    device = torch.device(settings.device)
    images = settings.sets()[0].images.to(device)
    loss = Recorder(loss_named(name, settings.backend), settings.steps, folder)
    trainer = settings.trainer(loss, images.shape[1])
    memory = PeakMemory(device)
    history = train.fit(trainer, images, settings.batch, settings.seed, f"training, {name}")
    extra = memory.extra()
    peak = resident_peak() if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
    method = trainer.method
    assert isinstance(method, VICReg)
    torch.save(method.encoder.state_dict(), encoder_file)
    return Outcome(history.losses, history.seconds, peak, extra)


def loss_memory(settings: Settings, name: str, embeddings: Path) -> int:
    """Bytes at the peak of one loss, forward and backward, above its two inputs."""
    loss = loss_named(name, settings.backend)
    device = torch.device(settings.device)
    # What a process loads and keeps at its first product and backward is not the loss's.
    for rows, dim in ((8, 16), (16, 8)):
        small = [torch.randn(rows, dim, device=device, requires_grad=True) for _ in range(2)]
        loss(*small).backward()
    x, y = torch.load(embeddings, map_location=device)
    x, y = x.requires_grad_(), y.requires_grad_()
    memory = PeakMemory(device)
    loss(x, y).backward()
    return memory.extra()


def make_repeatable() -> None:
    """The same seed gives the same run: no algorithm chosen by its speed of the moment."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
