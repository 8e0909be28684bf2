"""WebDataset shards read at random: a pass over the headers says where each sample's files lie.

A sample is the files of a tar that share a name up to its first dot: 000017.jpg and 000017.cls.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WHERE = "data.path or data.test"


@dataclass(frozen=True)
class Sample:
    """files: suffix, in small letters -> (offset, size) in bytes."""

    key: str
    files: dict[str, tuple[int, int]]


def paths(pattern: str | Path) -> list[Path]:
    """A folder's *.tar in order, or the tars that a path with {000..127}, {a,b}, * and ? names."""
    text = str(pattern)
    if os.path.isdir(text):
        names = [str(path) for path in sorted(Path(text).glob("*.tar"))]
    else:
        names = []
        for name in _expanded(text):
            found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            names += [one for one in found if os.path.isfile(one)]
            if not found or not os.path.isfile(found[0]):
                raise ValueError(f"{WHERE}: got {text!r}, but {name!r} is no file")
    if not names:
        raise ValueError(f"{WHERE}: got {text!r}, takes a folder that holds *.tar shards")
    return [Path(name) for name in dict.fromkeys(names)]


def _expanded(pattern: str) -> list[str]:
    """As a shell expands braces."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = numbers.groups()
        padded = any(n.startswith("0") and len(n) > 1 for n in (first, last))
        width = max(len(first), len(last)) if padded else 0
        options = [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)]
    else:
        options = found[1].split(",")
    if not options or (len(options) == 1 and not numbers):
        raise ValueError(f"{WHERE}: got {pattern!r}, braces take {{000..127}} or {{a,b}}")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [one for option in options for one in _expanded(f"{before}{option}{after}")]


def damaged(path: Path, why: object) -> ValueError:
    return ValueError(
        f"shard {str(path)!r} is truncated or damaged ({why}); delete it or write it again"
    )


def index(path: str | Path) -> list[Sample]:
    """A shard's samples. Raises ValueError where it is truncated or no uncompressed tar."""
    path = Path(path)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        # tarfile itself takes an archive that ends between two members for whole.
        file.seek(max(0, size - 1024))
        if size == 0 or any(file.read()):
            raise damaged(path, f"{size} bytes, without the end of an archive")
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                folder, name = os.path.split(member.name)
                stem, dot, suffix = name.partition(".")
                if not (member.isfile() and stem and dot):
                    continue
                key = os.path.join(folder, stem)
                files = samples.setdefault(key, Sample(key, {})).files
                if suffix.lower() in files:
                    raise ValueError(f"shard {str(path)!r}: holds {member.name!r} twice")
                files[suffix.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise damaged(path, error) from error
    return list(samples.values())


def read(path: Path, place: tuple[int, int]) -> bytes:
    offset, size = place
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise damaged(path, f"it ended at {offset + len(content)} bytes while it was read")
    return content


class Files:
    """One file of each sample of many shards: the first of `suffixes` that a sample has.

    In arrays, because a DataLoader's workers would copy millions of small objects, each of them.
    Raises ValueError where a sample has none, unless it is `optional`.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        samples: Sequence[Sequence[Sample]],
        suffixes: Sequence[str],
        optional: bool = False,
    ) -> None:
        self.shards, self.suffixes = list(shards), tuple(suffixes)
        rows, keys = [], []
        for number, (shard, found) in enumerate(zip(shards, samples, strict=True)):
            for sample in found:
                suffix = next((s for s in self.suffixes if s in sample.files), None)
                if suffix is not None:
                    rows.append((number, self.suffixes.index(suffix), *sample.files[suffix]))
                elif optional:
                    rows.append((number, -1, 0, 0))
                else:
                    raise ValueError(
                        f"shard {str(shard)!r}: sample {sample.key!r} has "
                        f"{_listed(sorted(sample.files))}, takes one of {_listed(self.suffixes)}"
                    )
                keys.append(os.fsencode(sample.key))
        self.rows, self.keys = np.array(rows, dtype=np.int64).reshape(-1, 4), np.array(keys)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, number: int) -> str:
        shard, key = self.shards[self.rows[number, 0]], os.fsdecode(bytes(self.keys[number]))
        return f"shard {str(shard)!r}, sample {key!r}"

    def read(self, number: int) -> tuple[str, bytes]:
        """(suffix, content); ("", b"") where the sample has none."""
        shard, suffix, offset, size = self.rows[number].tolist()
        if suffix < 0:
            return "", b""
        return self.suffixes[suffix], read(self.shards[shard], (offset, size))


def _listed(suffixes: Sequence[str]) -> str:
    return ", ".join(f".{suffix}" for suffix in suffixes)
