"""Tar shards with two files a sample, 000000123.npz (arrays) and 000000123.json (a record). A shard
is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.files import tar_index


def write(
    path: Path,
    samples: Iterable[tuple[int, bytes, bytes]],
    done: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a shard. samples: (number, .npz, .json) each; done: called after each sample with 1."""
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with tarfile.open(partial_path, "w", format=tarfile.USTAR_FORMAT) as shard:
            for number, arrays, record in samples:
                for suffix, content in (("npz", arrays), ("json", record)):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")  # dated 1970: same bytes
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
    arrays: tuple[int, int]
    record: tuple[int, int]


def index_of(path: str | Path) -> list[Entry]:
    """The samples of a shard. Raises ValueError if it is truncated or not of this format."""
    path = Path(path)
    if path.stat().st_size % tarfile.RECORDSIZE:
        raise tar_index.damaged(path, "no whole number of records")
    entries = []
    for sample in tar_index.index(path):
        if set(sample.files) != {"npz", "json"}:
            raise tar_index.damaged(path, f"sample {sample.key} has {sorted(sample.files)}")
        entries.append(Entry(path, sample.key, sample.files["npz"], sample.files["json"]))
    return entries


def read(entry: Entry) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """A sample's arrays by name, and its record. Raises ValueError if it is damaged."""
    arrays, record = (tar_index.read(entry.path, place) for place in (entry.arrays, entry.record))
    try:
        with np.load(io.BytesIO(arrays)) as packed:
            return {name: packed[name] for name in packed.files}, json.loads(record)
    except Exception as error:  # zipfile, zlib, numpy and json each have their own
        raise damaged(entry, error) from error


def damaged(entry: Entry, why: object) -> ValueError:
    return ValueError(f"shard {str(entry.path)!r}: sample {entry.key}: {why}")
