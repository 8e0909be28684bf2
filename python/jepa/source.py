"""Batches by the number of the step: what a step sees depends on the seed and the step alone, so a
resumed run needs no state, and every rank takes its own rows of the same batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jepa.data import Images


def mixed(*parts: int) -> int:
    """A seed of 63 bits from several numbers (splitmix64's finaliser, chained)."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
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
        generator = torch.Generator().manual_seed(mixed(self.seed, 1, epoch))
        order = torch.randperm(self.samples, generator=generator)
        return order[place * self.batch : (place + 1) * self.batch]


@dataclass(frozen=True)
class Share:
    """A rank's rows of a batch: an equal part, in the order of ranks."""

    rank: int = 0
    ranks: int = 1

    def of(self, rows: Any) -> Any:
        size = len(rows) // self.ranks
        return rows[self.rank * size : (self.rank + 1) * size]


class ImageSource:
    """Batches [B, C, H, W] of images in memory."""

    def __init__(self, images: Images, batch: int, seed: int) -> None:
        self.images, self.plan = images, Plan(len(images), batch, seed)
        self.channels = images.images.shape[1]

    def batches(self, start: int, share: Share) -> Iterator[Tensor]:
        """The batches of step `start` and after, without end; all rows: views are drawn for the
        whole batch.
        """
        step = start
        while True:
            yield self.images.images[self.plan.rows(step)]
            step += 1


class Clips(Dataset[Tensor]):
    """float32 [C, frames, H, W] in [0, 1] at (video, first frame) of videos uint8 [F, H, W, C]."""

    def __init__(self, videos: Sequence[Any], frames: int, stride: int) -> None:
        self.videos, self.frames, self.stride = videos, frames, stride

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, at: tuple[int, float]) -> Tensor:
        index, where = at
        video = torch.as_tensor(self.videos[index])
        span = (self.frames - 1) * self.stride + 1
        if video.shape[0] < span:
            raise ValueError(
                f"data.frames: video {index} has {video.shape[0]} frames, a clip takes {span}"
            )
        first = min(int(where * (video.shape[0] - span + 1)), video.shape[0] - span)
        clip = video[first : first + span : self.stride]
        return clip.permute(3, 0, 1, 2).float() / 255.0


class _Steps:
    """The samples of every step from `start` on, a rank's share of them."""

    def __init__(self, plan: Plan, start: int, share: Share) -> None:
        self.plan, self.start, self.share = plan, start, share

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        step = self.start
        while True:
            generator = torch.Generator().manual_seed(mixed(self.plan.seed, 2, step))
            where = torch.rand(self.plan.batch, generator=generator).tolist()
            pairs = list(zip(self.plan.rows(step).tolist(), where, strict=True))
            yield self.share.of(pairs)
            step += 1


class ClipSource:
    """Batches [B, C, frames, H, W] of clips, each beginning anywhere in its video."""

    def __init__(self, clips: Clips, batch: int, seed: int, workers: int = 0) -> None:
        self.clips, self.plan, self.workers = clips, Plan(len(clips), batch, seed), workers
        self.channels = 3

    def batches(self, start: int, share: Share) -> Iterator[Tensor]:
        steps: Any = _Steps(self.plan, start, share)
        return iter(
            DataLoader(
                self.clips,
                batch_sampler=steps,
                num_workers=self.workers,
                persistent_workers=self.workers > 0,
            )
        )
