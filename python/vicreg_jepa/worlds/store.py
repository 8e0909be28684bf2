"""Trajectories on disk: shards of episodes, with random access to windows of them."""

from __future__ import annotations

import io
import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vicreg_jepa.files import listing, output, samples
from vicreg_jepa.worlds.episodes import Episode

SETTINGS = "trajectories.json"
VERSION = 1
STATE = "state_"  # the prefix of the true state, among the arrays of a sample


def write(
    folder: str | Path,
    episodes: Iterable[Episode],
    settings: dict[str, Any],
    per_shard: int = 256,
    done: Callable[[int], None] = lambda count: None,
) -> list[Path]:
    """Write episodes as shards into a new or empty folder. The file with `settings`, which describe
    the origin of the episodes, is written last: a folder without it is incomplete and is not read.

    Raises ValueError if the folder is not empty, or there is no episode.
    """
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise ValueError(f"output: got {str(root)!r}, a file; takes a folder")
    if root.is_dir() and any(root.iterdir()):
        raise ValueError(f"output: got {str(root)!r}, which is not empty; takes a new folder")
    with output.writing(root):
        root.mkdir(parents=True, exist_ok=True)
    lengths: list[int] = []
    shards: list[Path] = []

    def packed(episode: Episode) -> tuple[int, bytes, bytes]:
        lengths.append(len(episode.actions))
        record = json.dumps(episode.record, separators=(",", ":"))
        return len(lengths) - 1, _arrays(episode), record.encode()

    source = iter(episodes)
    for first in source:
        path = root / f"trajectories-{len(shards):06d}.tar"
        with output.writing(path):
            samples.write(path, map(packed, _chain(first, islice(source, per_shard - 1))), done)
        shards.append(path)
    if not shards:
        raise ValueError("episodes: got none, takes at least one")
    made = {**settings, "version": VERSION, "shards": len(shards), "lengths": lengths}
    output.replace(root / SETTINGS, (json.dumps(made) + "\n").encode())
    return shards


def _chain(first: Episode, others: Iterable[Episode]) -> Iterator[Episode]:
    yield first
    yield from others


def _arrays(episode: Episode) -> bytes:
    """The format of numpy.savez_compressed, with less compression, which is faster."""
    arrays = {"frames": episode.frames, "actions": episode.actions}
    arrays |= {STATE + name: values for name, values in episode.states.items()}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, values in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: same bytes
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(values), allow_pickle=False)
    return packed.getvalue()


class Trajectories(ABC):
    """Episodes by number. lengths: the number of actions of each; settings: their origin."""

    lengths: Sequence[int]
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def episode(self, number: int) -> Episode:
        """One whole episode. Raises ValueError if what is stored of it is damaged."""

    def windows(self, length: int, stride: int = 1) -> Windows:
        """All windows of `length` actions and length + 1 frames, which begin at every stride-th
        step of each episode. Raises ValueError if no episode is so long.
        """
        return Windows(self, length, stride)


class Shards(Trajectories):
    """The trajectories that `write` wrote into a folder.

    Raises ValueError if the folder is incomplete, or a shard is missing, truncated or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        root = Path(folder)
        path = root / SETTINGS
        if not path.exists():
            raise ValueError(
                f"folder: got {str(root)!r}, takes one with {SETTINGS}, which `vicreg-jepa "
                "collect` writes last"
            )
        listing.regular(path, "folder")
        try:
            self.settings = json.loads(path.read_text(encoding="utf-8"))
            if self.settings["version"] != VERSION:
                raise ValueError(f"its version is {self.settings['version']}, takes {VERSION}")
            self.lengths = [int(length) for length in self.settings.pop("lengths")]
            names = [f"trajectories-{n:06d}.tar" for n in range(self.settings.pop("shards"))]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path}: is damaged ({error!r})") from error
        self.entries: list[samples.Entry] = []
        for name in names:
            self.entries += samples.index_of(listing.regular(root / name, "shard"))
        if len(self.entries) != len(self.lengths):
            raise ValueError(
                f"{path}: names {len(self.lengths)} episodes, but its shards hold "
                f"{len(self.entries)}"
            )

    def episode(self, number: int) -> Episode:
        entry, length = self.entries[number], self.lengths[number]
        arrays, record = samples.read(entry)
        for name, kind, rank in (("frames", np.uint8, 4), ("actions", np.float32, 2)):
            if name not in arrays or arrays[name].dtype != kind or arrays[name].ndim != rank:
                raise samples.damaged(entry, f"has no {name} of {rank} dimensions")
        frames, actions = arrays.pop("frames"), arrays.pop("actions")
        if len(actions) != length or len(frames) != length + 1:
            raise samples.damaged(
                entry, f"has {len(frames)} frames and {len(actions)} actions, takes {length} and 1"
            )
        states = {name.removeprefix(STATE): values for name, values in arrays.items()}
        return Episode(frames, actions, states, record)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of trajectories: each has frames uint8 [L + 1, H, W, C], actions float32 [L, A]."""

    def __init__(self, source: Trajectories, length: int, stride: int = 1) -> None:
        for name, value in (("length", length), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, takes an integer from 1")
        self.source, self.length = source, length
        starts = [np.arange(0, its - length + 1, stride) for its in source.lengths]
        self.starts = np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)
        self.episodes = np.repeat(np.arange(len(starts)), [len(its) for its in starts])
        if not len(self.starts):
            raise ValueError(
                f"length: got {length}, takes at most {max(source.lengths, default=0)}, the "
                "longest episode's actions"
            )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        frames, actions = self.batch([index])
        return frames[0], actions[0]

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(frames uint8 [B, L + 1, H, W, C], actions float32 [B, L, A]) of windows in any order. An
        episode with several of the windows is read once.
        """
        chosen = np.asarray(indices)
        windows: list[tuple[NDArray[np.uint8], NDArray[np.float32]] | None] = [None] * len(chosen)
        for number in np.unique(self.episodes[chosen]):
            episode = self.source.episode(int(number))
            for place in np.flatnonzero(self.episodes[chosen] == number):
                start = self.starts[chosen[place]]
                windows[place] = (
                    episode.frames[start : start + self.length + 1],
                    episode.actions[start : start + self.length],
                )
        frames, actions = zip(*(one for one in windows if one is not None), strict=True)
        return torch.from_numpy(np.stack(frames)), torch.from_numpy(np.stack(actions))
