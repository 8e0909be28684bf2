"""The videos that clips are cut from: simulated ones, WebDataset shards, or the files of a folder.

Each video has a length, and its slices are uint8 [F, size, size, 3].
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vicreg_jepa.config import Config
from vicreg_jepa.data.video_decoders import Recording, decoder
from vicreg_jepa.files import listing, tar_index
from vicreg_jepa.files.pictures import DEFAULT, Limits, Refused, square

SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
PHYSICS = Path("runs/physics")


def of(settings: Config) -> Any:
    """The training videos of a run."""
    data = settings.data
    if data.kind == "physics":
        return simulated(
            data.path or PHYSICS, data.videos, settings.seed, data.workers, data.size, data.noise
        )
    assert data.path is not None
    if data.kind == "webdataset":
        return VideoShards(data.path, data.size, data.decoder, data.limits)
    return VideoFolder(data.path, data.size, data.decoder, data.limits)


def labels(settings: Config, key: str | None) -> list[str]:
    """The label of each training video. key: of the records of physics videos and shards; the
    default for physics is the family of the scene.
    """
    videos = of(settings)
    if isinstance(videos, torch.utils.data.Subset):
        return videos.dataset.labels(key or "family")[: len(videos)]
    return videos.labels(key)


def simulated(
    folder: Path, videos: int, seed: int, workers: int, size: int, noise: float = 0.0
) -> Any:
    """The first `videos` physics videos of the seed; those missing from the folder are simulated
    first. The folder holds them without noise, which is laid over what is read.
    """
    from tqdm import tqdm

    from vicreg_jepa.physics import shards

    with tqdm(total=videos, desc="physics videos", unit="video", ncols=100) as bar:
        shards.write(folder, videos, shards.Settings(seed), workers, bar.update)
    shown = PhysicsVideos(folder, size, seed, noise)
    return torch.utils.data.Subset(shown, range(videos))


class VideoFolder:
    """Every video file below a folder, links to folders included. Hidden files are left out, with a
    message. Raises ValueError if there is no video, or one is not a regular file.
    """

    def __init__(
        self,
        folder: str | Path,
        size: int,
        decoding: str = "auto",
        limits: Limits = DEFAULT,
    ) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"data.path: got {str(root)!r}, takes a folder of videos")
        self.names, skipped = listing.below(root, _is_video, "data.path")
        listing.skip("data.path", root, skipped)
        self.files = [root / name for name in self.names]
        if not self.files:
            raise ValueError(f"data.path: {root} holds no video ({', '.join(SUFFIXES)})")
        self.size, self.recording, self.limits = size, decoder(decoding), limits

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Recording:
        path = self.files[index]
        return self.recording(repr(str(path)), path, self.size, self.limits)

    def labels(self, key: str | None) -> list[str]:
        """The class folder of each video, directly below the data folder. Raises ValueError for a
        video in no class folder, and for a key, because files have no records.
        """
        if key is not None:
            raise ValueError(
                f"label: got {key!r}, but videos in folders are labelled by their folder"
            )
        alone = [name for name in self.names if os.sep not in name]
        if alone:
            raise ValueError(f"label: video {alone[0]!r} is in no class folder")
        return [name.split(os.sep)[0] for name in self.names]


def _is_video(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


class VideoShards:
    """The videos of WebDataset shards: files, or the array `video` of a .npz."""

    def __init__(
        self,
        pattern: str | Path,
        size: int,
        decoding: str = "auto",
        limits: Limits = DEFAULT,
    ) -> None:
        shards = tar_index.paths(pattern)
        suffixes = ("npz", *(suffix[1:] for suffix in SUFFIXES))
        self.files = tar_index.Files(shards, tar_index.indices(shards), suffixes, limits.max_bytes)
        self.size, self.limits = size, limits
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
            return self.recording(f"of {where}", content, self.size, self.limits)
        return Array(where, _unpacked(where, content, self.limits.max_bytes), self.size)

    def labels(self, key: str | None) -> list[str]:
        """A label for each sample: `key` of its .json (for a list, its length). Without a key it is
        the .cls, or `label` or `cls` of the .json. Raises ValueError naming a sample without a
        label.
        """
        suffixes = ("cls", "json") if key is None else ("json",)
        shards, most = self.files.shards, self.limits.max_bytes
        files = tar_index.Files(shards, tar_index.indices(shards), suffixes, most, optional=True)
        return [_label(files, number, key) for number in range(len(files))]


class PhysicsVideos(VideoShards):
    """The physics videos of a seed. noise: the strength of what cannot be predicted."""

    def __init__(self, folder: Path, size: int, seed: int, noise: float) -> None:
        super().__init__(folder, size)
        self.seed, self.noise = seed, noise

    def __getitem__(self, index: int) -> Recording | Array:
        from vicreg_jepa.physics import shards, unpredictable

        video = super().__getitem__(index)
        assert isinstance(video, Array)
        if self.noise:
            seed = shards.sample_seed(self.seed, index)
            video.change = unpredictable.of_possible(seed, self.noise)
        return video


def _label(files: tar_index.Files, number: int, key: str | None) -> str:
    suffix, content = files.read(number)
    try:
        if suffix != "json":
            value: Any = content.decode().strip()
        else:
            record = json.loads(content)
            value = next(record[n] for n in ((key,) if key else ("label", "cls")) if n in record)
        if isinstance(value, list):
            value = len(value)
        if not isinstance(value, str | int) or value == "":
            raise ValueError(f"it is {value!r}")
        return str(value)
    except (ValueError, TypeError, KeyError, StopIteration) as error:
        named = f"`{key}` in .json" if key else "one in .cls, or in .json as `label` or `cls`"
        raise ValueError(f"label: {files.where(number)} has none, takes {named}") from error


def _unpacked(where: str, content: bytes, max_bytes: int) -> NDArray[np.uint8]:
    """The array `video` of a .npz; its size is checked before it is unpacked."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if "video.npy" not in archive.namelist():
                raise Refused("holds no array `video`")
            packed = archive.getinfo("video.npy").file_size
            with archive.open("video.npy") as file:
                shape, _, kind = _header(file)
                _check(shape, kind, packed - file.tell(), max_bytes)
            with archive.open("video.npy") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
    except Refused as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise ValueError(f"{where}: {str(error).partition(chr(10))[0]}") from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _check(shape: tuple[int, ...], kind: np.dtype, packed: int, max_bytes: int) -> None:
    if kind != np.uint8 or len(shape) != 4 or shape[-1] != 3 or min(shape) < 1:
        raise Refused(f"`video` is {kind} {list(shape)}, takes uint8 [F, H, W, 3]")
    size = math.prod(shape)
    if size > max_bytes:
        raise Refused(f"`video` has {size} bytes, takes at most {max_bytes} (data.max_bytes)")
    if size != packed:
        raise Refused(f"`video` has {packed} bytes of the {size} that its header names")


class Array:
    """A video in memory, frames [F, H, W, 3], with the interface of a recording.

    change: a function of frames and of their numbers, which changes what is read.
    """

    change: Callable[[NDArray[np.uint8], Sequence[int]], NDArray[np.uint8]] | None = None

    def __init__(self, name: str, frames: NDArray[np.uint8], size: int) -> None:
        self.name, self.frames, self.size = name, frames, size

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, places: slice) -> NDArray[np.uint8]:
        frames = self.frames[places]
        if self.change is not None:
            frames = self.change(frames, range(*places.indices(len(self.frames))))
        if frames.shape[1:3] == (self.size, self.size):
            return frames
        from PIL import Image

        return np.stack([square(Image.fromarray(frame), self.size) for frame in frames])


def decode(path: str | Path, size: int) -> Tensor:
    """A whole video file, uint8 [F, size, size, 3]."""
    listing.regular(path, "video")
    return torch.from_numpy(decoder("auto")(repr(str(path)), Path(path), size)[:])
