"""Batches by step number: a batch depends only on the seed and the step, so a resumed run needs no
state, and every rank takes its own rows of the same batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vicreg_jepa.distributed.ranks import Share


class Stream(IntEnum):
    """The uses of random numbers; each has its own stream."""

    EPOCH = 1  # the order of the samples
    CLIP = 2  # where in its video each clip begins
    MODEL = 3  # what the model draws
    METHOD = 4  # views and masks
    EPISODE = 5  # simulated for training
    HELD_OUT = 6  # episodes for probes and signs of collapse


def seed_for(stream: Stream, seed: int, *parts: int) -> int:
    """A 63-bit seed from the run's seed and other numbers (splitmix64's finaliser, chained)."""
    value = 0x9E3779B97F4A7C15
    for part in (seed, stream, *parts):
        value = (value ^ part) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1


@dataclass(frozen=True)
class Plan:
    """The samples of each step: every epoch has a new order, and its incomplete last batch is
    dropped.
    """

    samples: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if not 2 <= self.batch <= self.samples:
            raise ValueError(
                f"training.batch: got {self.batch}, takes 2 to {self.samples} (all samples)"
            )

    def rows(self, step: int) -> Tensor:
        """[batch] indices."""
        per_epoch = self.samples // self.batch
        epoch, place = divmod(step, per_epoch)
        order = _order(self.samples, seed_for(Stream.EPOCH, self.seed, epoch))
        return order[place * self.batch : (place + 1) * self.batch]


@lru_cache(maxsize=2)  # of a million samples it takes longer than a step
def _order(samples: int, seed: int) -> Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed))


class Steps:
    """A rank's share of the samples of every step from `start` on."""

    def __init__(self, plan: Plan, start: int, share: Share) -> None:
        self.plan, self.start, self.share = plan, start, share

    def of(self, step: int) -> list[Any]:
        return self.plan.rows(step).tolist()

    def __iter__(self) -> Iterator[list[Any]]:
        for step in count(self.start):
            yield self.share.of(self.of(step))


class _ClipSteps(Steps):
    """Adds the place in [0, 1) of its video at which each clip begins."""

    def of(self, step: int) -> list[tuple[int, float]]:
        generator = torch.Generator().manual_seed(seed_for(Stream.CLIP, self.plan.seed, step))
        where = torch.rand(self.plan.batch, generator=generator).tolist()
        return list(zip(super().of(step), where, strict=True))


class ImageSource:
    """Batches [B, C, H, W] of images, in memory or on disk; `images[rows]` returns some of them.

    whole: every rank takes all rows, because views are drawn for the whole batch.
    """

    def __init__(
        self, images: Any, batch: int, seed: int, workers: int = 0, whole: bool = True
    ) -> None:
        self.images, self.plan, self.workers = images, Plan(len(images), batch, seed), workers
        self.channels, self.whole = images.channels, whole

    def batches(self, start: int, share: Share) -> Iterator[Tensor]:
        """The batches from step `start` on, without end."""
        steps = Steps(self.plan, start, Share() if self.whole else share)
        return loader(self.images, steps, self.workers)

    def sample(self, most: int) -> Tensor:
        """At most `most` images, spread evenly over the set, which may be sorted by class."""
        count = min(most, len(self.images))
        return self.images[torch.linspace(0, len(self.images) - 1, count).long().tolist()]


def in_order(images: Any, batch: int, workers: int) -> Iterator[Tensor]:
    """All images in order, one batch at a time."""
    rows = range(len(images))
    return loader(images, [rows[i : i + batch] for i in rows[::batch]], workers)


def loader(samples: Any, steps: Iterable[Any], workers: int) -> Iterator[Any]:
    """Load samples[step] of each step; an error in a worker is raised as if it came from this
    process.

    The DataLoader does no batching of its own: the samples return whole batches.
    """
    loader = DataLoader(
        _Told(samples), sampler=cast(Any, steps), batch_size=None, num_workers=workers
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            line = str(error).partition("\n")[0]
            if "DataLoader worker" not in line:
                raise
            raise WorkerError(
                f"data.workers: {line} (perhaps out of memory: use fewer workers)"
            ) from error
        if isinstance(batch, Exception):
            raise batch
        yield batch


class WorkerError(ValueError):
    """A worker process has ended."""


class _Told(Dataset[Any]):
    """Returns an error as the value of a sample that cannot be read: the loader would wrap an
    exception of a worker in the text of a traceback.
    """

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __getitem__(self, rows: Any) -> Any:
        try:
            return self.samples[rows]
        except (ValueError, OSError, MemoryError, ImportError) as error:
            return error


class Clips(Dataset[Tensor]):
    """float32 [C, frames, H, W] in [0, 1] at (video, first frame) of videos uint8 [F, H, W, C].

    A video is an array, or any object with a length whose slices are arrays of frames.
    """

    def __init__(self, videos: Any, frames: int, stride: int) -> None:
        self.videos, self.frames, self.stride = videos, frames, stride

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, at: tuple[int, float]) -> Tensor:
        index, where = at
        video = self.videos[index]
        span = (self.frames - 1) * self.stride + 1
        while True:
            length = len(video)
            if length < span:
                name = getattr(video, "name", f"video {index}")
                raise ValueError(
                    f"data.frames: {name} has {length} frames, a clip takes {span} "
                    f"({self.frames}, {self.stride} apart)"
                )
            first = min(int(where * (length - span + 1)), length - span)
            clip = torch.as_tensor(video[first : first + span : self.stride])
            # A file may hold fewer frames than its header says; after a read its length is
            # corrected.
            if len(clip) == self.frames:
                return clip.permute(3, 0, 1, 2).float() / 255.0


class ClipSource:
    """Batches [B, C, frames, H, W] of clips, each from a random place of its video."""

    def __init__(self, clips: Clips, batch: int, seed: int, workers: int = 0) -> None:
        self.clips, self.plan, self.workers = clips, Plan(len(clips), batch, seed), workers
        self.channels = 3

    def sample(self, most: int) -> Tensor:
        """The first clip of at most `most` videos, spread evenly over the set."""
        count = min(most, len(self.clips))
        rows = torch.linspace(0, len(self.clips) - 1, count).long().tolist()
        return torch.stack([self.clips[row, 0.0] for row in rows])

    def batches(self, start: int, share: Share) -> Iterator[Tensor]:
        return loader(_Stacked(self.clips), _ClipSteps(self.plan, start, share), self.workers)


class _Stacked:
    """Batches of clips."""

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __getitem__(self, places: list[tuple[int, float]]) -> Tensor:
        return torch.stack([self.clips[place] for place in places])
