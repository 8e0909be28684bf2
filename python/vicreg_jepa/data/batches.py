"""Batches by the number of the step: what a step sees depends on the seed and the step alone, so a
resumed run needs no state, and every rank takes its own rows of the same batch.
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
    """What random numbers are drawn for: each has a stream of its own."""

    EPOCH = 1  # the order of the samples
    CLIP = 2  # where in its video each clip begins
    MODEL = 3  # what the model draws
    METHOD = 4  # views and masks


def seed_for(stream: Stream, seed: int, *parts: int) -> int:
    """A seed of 63 bits from the run's and other numbers (splitmix64's finaliser, chained)."""
    value = 0x9E3779B97F4A7C15
    for part in (seed, stream, *parts):
        value = (value ^ part) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1


@dataclass(frozen=True)
class Plan:
    """Which samples each step takes: every epoch in a new order, its incomplete end left out."""

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


class _Steps:
    """Which samples every step from `start` on takes, a rank's share of them."""

    def __init__(self, plan: Plan, start: int, share: Share) -> None:
        self.plan, self.start, self.share = plan, start, share

    def of(self, step: int) -> list[Any]:
        return self.plan.rows(step).tolist()

    def __iter__(self) -> Iterator[list[Any]]:
        for step in count(self.start):
            yield self.share.of(self.of(step))


class _ClipSteps(_Steps):
    """With where in its video each clip begins, in [0, 1)."""

    def of(self, step: int) -> list[tuple[int, float]]:
        generator = torch.Generator().manual_seed(seed_for(Stream.CLIP, self.plan.seed, step))
        where = torch.rand(self.plan.batch, generator=generator).tolist()
        return list(zip(super().of(step), where, strict=True))


class ImageSource:
    """Batches [B, C, H, W] of images, in memory or stored; `images[rows]` gives some of them.

    whole: every rank takes all rows, as it must where views are drawn for the whole batch.
    """

    def __init__(
        self, images: Any, batch: int, seed: int, workers: int = 0, whole: bool = True
    ) -> None:
        self.images, self.plan, self.workers = images, Plan(len(images), batch, seed), workers
        self.channels, self.whole = images.channels, whole

    def batches(self, start: int, share: Share) -> Iterator[Tensor]:
        """The batches of step `start` and after, without end."""
        steps = _Steps(self.plan, start, Share() if self.whole else share)
        return _loader(self.images, steps, self.workers)

    def sample(self, most: int) -> Tensor:
        """At most so many images, evenly over the set: it may be in the order of its classes."""
        count = min(most, len(self.images))
        return self.images[torch.linspace(0, len(self.images) - 1, count).long().tolist()]


def in_order(images: Any, batch: int, workers: int) -> Iterator[Tensor]:
    """All images, a batch at a time."""
    rows = range(len(images))
    return _loader(images, [rows[i : i + batch] for i in rows[::batch]], workers)


def _loader(samples: Any, steps: Iterable[Any], workers: int) -> Iterator[Tensor]:
    """samples[step] of each; a worker's error is raised as this process's own would be.

    Without the DataLoader's own batches: a whole one is asked for at once.
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
                f"data.workers: {line} (its memory may not suffice: take fewer of them)"
            ) from error
        if isinstance(batch, Exception):
            raise batch
        yield batch


class WorkerError(ValueError):
    """A process that reads has ended."""


class _Told(Dataset[Any]):
    """Gives an error in the place of what cannot be read: the loader would wrap a worker's in the
    text of a traceback.
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

    A video is an array, or anything else that has a length and gives its frames by slices.
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
            # A file may show fewer frames than it promises; its length is known better now.
            if len(clip) == self.frames:
                return clip.permute(3, 0, 1, 2).float() / 255.0


class ClipSource:
    """Batches [B, C, frames, H, W] of clips, each beginning anywhere in its video."""

    def __init__(self, clips: Clips, batch: int, seed: int, workers: int = 0) -> None:
        self.clips, self.plan, self.workers = clips, Plan(len(clips), batch, seed), workers
        self.channels = 3

    def sample(self, most: int) -> Tensor:
        """The first clip of at most so many videos, evenly over the set."""
        count = min(most, len(self.clips))
        rows = torch.linspace(0, len(self.clips) - 1, count).long().tolist()
        return torch.stack([self.clips[row, 0.0] for row in rows])

    def batches(self, start: int, share: Share) -> Iterator[Tensor]:
        return _loader(_Stacked(self.clips), _ClipSteps(self.plan, start, share), self.workers)


class _Stacked:
    """Batches of clips."""

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __getitem__(self, places: list[tuple[int, float]]) -> Tensor:
        return torch.stack([self.clips[place] for place in places])
