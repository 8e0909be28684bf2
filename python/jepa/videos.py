"""Videos to take clips from: simulated, in WebDataset shards, or a folder's files.

Each has a length and gives uint8 [F, size, size, 3] by slices of its frames.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jepa import pictures, tars
from jepa.config import Config
from jepa.pictures import square
from jepa.recording import Recording, decoder

SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
PHYSICS = Path("runs/physics")


def of(settings: Config) -> Sequence[Any]:
    """The training videos of a run."""
    data = settings.data
    if data.kind == "physics":
        return simulated(data.path or PHYSICS, data.videos, settings.seed, data.workers, data.size)
    assert data.path is not None
    if data.kind == "webdataset":
        return Shards(data.path, data.size, data.decoder)
    return Folder(data.path, data.size, data.decoder)


def simulated(folder: Path, videos: int, seed: int, workers: int, size: int) -> Sequence[Any]:
    """The first `videos` of the seed's physics videos; those not in the folder are made first."""
    from tqdm import tqdm

    from jepa.physics import shards

    with tqdm(total=videos, desc="physics videos", unit="video", ncols=100) as bar:
        shards.write(folder, videos, shards.Settings(seed), workers, bar.update)
    return torch.utils.data.Subset(Shards(folder, size), range(videos))


class Folder:
    """Every video file below a folder."""

    def __init__(self, folder: str | Path, size: int, decoding: str = "auto") -> None:
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"data.path: got {str(root)!r}, takes a folder of videos")
        self.files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self.files:
            raise ValueError(f"data.path: {root} holds no video ({', '.join(SUFFIXES)})")
        self.size, self.recording = size, decoder(decoding)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Recording:
        path = self.files[index]
        return self.recording(repr(str(path)), path, self.size)


class Shards:
    """The videos of WebDataset shards: files, or the array `video` of a .npz."""

    def __init__(self, pattern: str | Path, size: int, decoding: str = "auto") -> None:
        shards = tars.paths(pattern)
        suffixes = ("npz", *(suffix[1:] for suffix in SUFFIXES))
        self.files = tars.Files(shards, tars.indices(shards), suffixes, pictures.DEFAULT.max_bytes)
        self.size = size
        if any(self.files.rows[:, 1] > 0):
            self.recording = decoder(decoding)
        elif decoding != "auto":
            raise ValueError(f"data.decoder: got {decoding!r}, but the shards hold arrays alone")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Recording | Array:
        suffix, content = self.files.read(index)
        where = self.files.where(index)
        if suffix != "npz":
            return self.recording(f"of {where}", content, self.size)
        try:
            with np.load(io.BytesIO(content)) as packed:
                video = packed["video"]
        except Exception as error:  # zipfile, zlib and numpy each have their own
            raise ValueError(f"{where}: {error}") from error
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
            raise ValueError(
                f"{where}: `video` is {video.dtype} {list(video.shape)}, takes uint8 [F, H, W, 3]"
            )
        return Array(where, video, self.size)


class Array:
    """A video in memory, frames [F, H, W, 3], as a recording gives it."""

    def __init__(self, name: str, frames: NDArray[np.uint8], size: int) -> None:
        self.name, self.frames, self.size = name, frames, size

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, places: slice) -> NDArray[np.uint8]:
        frames = self.frames[places]
        if frames.shape[1:3] == (self.size, self.size):
            return frames
        from PIL import Image

        return np.stack([square(Image.fromarray(frame), self.size) for frame in frames])


def decode(path: str | Path, size: int) -> Tensor:
    """A whole video file, uint8 [F, size, size, 3]."""
    return torch.from_numpy(decoder("auto")(repr(str(path)), Path(path), size)[:])
