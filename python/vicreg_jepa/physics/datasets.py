"""Physics videos for torch's DataLoader: from shards, or simulated on the fly in its workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from vicreg_jepa.physics.shards import index_of, read, sample_seed
from vicreg_jepa.physics.videos import possible


class PhysicsShards(Dataset[Tensor]):
    """The videos of a folder's shards, in order: uint8 [T, 64, 64, 3] each ([4, T, ...] for
    quadruplets). Shuffle with the DataLoader; `record(i)` describes a video.

    Raises ValueError if the folder has no shards or one of them is truncated.
    """

    def __init__(self, folder: str | Path):
        paths = sorted(Path(folder).glob("physics-*.tar"))
        if not paths:
            raise ValueError(f"folder: got {str(folder)!r}, takes one with physics-*.tar shards")
        self.entries = [entry for path in paths for entry in index_of(path)]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(read(self.entries[index])[0])

    def record(self, index: int) -> dict:
        return read(self.entries[index])[1]


class Simulated(IterableDataset[Tensor]):
    """The videos that `write` would write with this seed, simulated on demand.

    videos: their number; None: without end. first: the first sample, to resume. The workers and the
    `ranks` processes of a training take turns, so together they yield each sample once.
    """

    def __init__(
        self, seed: int, videos: int | None = None, first: int = 0, rank: int = 0, ranks: int = 1
    ):
        if seed < 0:
            raise ValueError(f"seed: got {seed}, takes an integer from 0")
        if videos is not None and videos < 1:
            raise ValueError(f"videos: got {videos}, takes an integer from 1, or None")
        if first < 0:
            raise ValueError(f"first: got {first}, takes an integer from 0")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank: got {rank} of {ranks} ranks, takes 0 to {ranks - 1}")
        self.seed, self.videos, self.first = seed, videos, first
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        index = self.first + self.rank + self.ranks * number
        while self.videos is None or index < self.first + self.videos:
            yield torch.from_numpy(possible(sample_seed(self.seed, index)).video)
            index += self.ranks * workers
