"""Videos in WebDataset-style tar shards: a sample is 000000123.npz (array `video`) and
000000123.json.

Sample i of a folder depends only on (seed, i), so writing may be stopped and resumed, and a folder
extended, at any time. A shard is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.files import listing, output, samples
from vicreg_jepa.files.samples import Entry, index_of
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
                made = pool.imap(make, indices, chunksize=4) if pool else map(make, indices)
                with output.writing(path):
                    samples.write(path, made, done)
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


def _sample(settings: Settings, index: int) -> tuple[int, bytes, bytes]:
    """The number, the .npz and the .json of a sample."""
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
    return index, packed.getvalue(), json.dumps(record, separators=(",", ":")).encode()


def read(entry: Entry) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """The video (possible: [T, 64, 64, 3], quadruplet: [4, T, 64, 64, 3]) and its record."""
    arrays, record = samples.read(entry)
    if "video" not in arrays:
        raise samples.damaged(entry, f"has the arrays {sorted(arrays)}, takes video")
    return arrays["video"], record
