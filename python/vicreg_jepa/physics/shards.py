"""Videos in WebDataset-style tar shards: a sample is 000000123.npz (array `video`) and
000000123.json.

Sample i of a folder depends only on (seed, i), so writing may be stopped and resumed, and a folder
extended, at any time. A shard is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.files import listing, output, tar_index
from vicreg_jepa.physics.quadruplets import quadruplet
from vicreg_jepa.physics.videos import possible

SETTINGS = "dataset.json"
VERSION = 1  # of the videos of a seed; folders of other versions are not extended


@dataclass(frozen=True)
class Settings:
    """The settings that determine the samples. property: of quadruplets; None: possible videos."""

    seed: int
    per_shard: int = 256
    property: str | None = None
    version: int = VERSION


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a set: `possible(sample_seed(seed, index))` is its video."""
    return (seed << 32) + index


def shard_name(number: int) -> str:
    return f"physics-{number:06d}.tar"


def write(
    folder: str | Path,
    videos: int,
    settings: Settings,
    workers: int = 0,
    done: Callable[[int], None] = lambda count: None,
) -> list[Path]:
    """Write the first `videos` samples; shards that are there already are kept.

    workers: processes that simulate, 0 for this one; done: called with the number of new
    samples. Raises ValueError if the folder holds samples of other settings or a damaged shard.
    """
    root = Path(folder)
    _claim(root, settings)
    # Only this process handles Ctrl-C; it ends the others.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    spawn = multiprocessing.get_context("spawn")
    pool = spawn.Pool(workers, signal.signal, ignore) if workers else None
    try:
        shards = []
        for number, start in enumerate(range(0, videos, settings.per_shard)):
            indices = range(start, min(start + settings.per_shard, videos))
            path = root / shard_name(number)
            # A longer shard is kept too, because it begins with the same samples.
            if not path.exists() or len(index_of(path)) < len(indices):
                make = partial(_sample, settings)
                samples = pool.imap(make, indices, chunksize=4) if pool else map(make, indices)
                with output.writing(path):
                    _write_shard(path, indices, samples, done)
            else:
                done(len(indices))
            shards.append(path)
        return shards
    finally:
        if pool:
            pool.terminate()
            pool.join()


def _claim(root: Path, settings: Settings) -> None:
    """Create the folder with these settings, or check that it has them."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"output: got {str(root)!r}, a file; takes a folder")
    with output.writing(root):
        root.mkdir(parents=True, exist_ok=True)
    path = root / SETTINGS
    if not path.exists():
        if any(root.glob("physics-*.tar")):
            raise ValueError(f"output: {str(root)!r} holds shards but no {SETTINGS}")
        output.replace(path, (json.dumps(asdict(settings)) + "\n").encode())
        return
    listing.regular(path, "output")
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(begun, dict):
            raise ValueError(f"it holds a {type(begun).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: is damaged ({error}), takes {json.dumps(asdict(settings))}, or another seed's"
        ) from error
    for name, value in asdict(settings).items():
        if begun.get(name) != value:
            raise ValueError(
                f"{name}: got {value!r}, but {str(root)!r} was begun with {begun.get(name)!r}; "
                "takes the same, or another output folder"
            )


def _sample(settings: Settings, index: int) -> tuple[bytes, bytes]:
    """The .npz and the .json of a sample."""
    seed = sample_seed(settings.seed, index)
    if settings.property is None:
        video, record = possible(seed)
    else:
        four = quadruplet(settings.property, seed)
        video = four.videos
        record = {
            **four.record,
            "possible_videos": four.possible.tolist(),
            "first_difference": four.first_difference,
            "behind_occluder": four.behind_occluder,
        }
    packed = io.BytesIO()
    np.savez_compressed(packed, video=video)
    return packed.getvalue(), json.dumps(record, separators=(",", ":")).encode()


def _write_shard(
    path: Path,
    indices: range,
    samples: Iterator[tuple[bytes, bytes]],
    done: Callable[[int], None],
) -> None:
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with tarfile.open(partial_path, "w", format=tarfile.USTAR_FORMAT) as shard:
            for index, parts in zip(indices, samples, strict=True):
                for suffix, content in zip(("npz", "json"), parts, strict=True):
                    member = tarfile.TarInfo(f"{index:09d}.{suffix}")  # dated 1970: same bytes
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
                done(1)
        os.replace(partial_path, path)
    finally:
        partial_path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Entry:
    """The places of a sample's two files in its shard: offset and size in bytes."""

    path: Path
    key: str
    video: tuple[int, int]
    record: tuple[int, int]


def index_of(path: str | Path) -> list[Entry]:
    """The samples of a shard. Raises ValueError if it is truncated or was not written by
    `write`.
    """
    path = Path(path)
    if path.stat().st_size % tarfile.RECORDSIZE:
        raise tar_index.damaged(path, "no whole number of records")
    entries = []
    for sample in tar_index.index(path):
        if set(sample.files) != {"npz", "json"}:
            raise tar_index.damaged(path, f"sample {sample.key} has {sorted(sample.files)}")
        entries.append(Entry(path, sample.key, sample.files["npz"], sample.files["json"]))
    return entries


def read(entry: Entry) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """The video (possible: [T, 64, 64, 3], quadruplet: [4, T, 64, 64, 3]) and its record."""
    video, record = (tar_index.read(entry.path, place) for place in (entry.video, entry.record))
    try:
        with np.load(io.BytesIO(video)) as packed:
            return packed["video"], json.loads(record)
    except Exception as error:  # zipfile, zlib, numpy and json each have their own
        raise ValueError(f"shard {str(entry.path)!r}: sample {entry.key}: {error}") from error
