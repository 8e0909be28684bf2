"""Random access to WebDataset shards: one pass over the headers finds the files of each sample.

A sample is the set of files in a tar with the same name up to the first dot: 000017.jpg and
000017.cls.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vicreg_jepa.files import listing

WHERE = "data.path or data.test"
BLOCK = tarfile.BLOCKSIZE
# The standard keys of an extended header; keys of single programs contain a dot.
KEYS = (
    "atime", "charset", "comment", "ctime", "gid", "gname", "hdrcharset", "linkpath", "mtime",
    "path", "size", "uid", "uname",
)  # fmt: skip
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


@dataclass(frozen=True)
class Sample:
    """files: suffix, in small letters -> (offset, size) in bytes."""

    key: str
    files: dict[str, tuple[int, int]]


def paths(pattern: str | Path) -> list[Path]:
    """The sorted *.tar of a folder, or the tars that match a path with {000..127}, {a,b}, * and ?.

    A file whose name equals the pattern is taken itself; brackets are not a pattern. Raises
    ValueError for a path that is not a regular file.
    """
    text = str(pattern)
    if os.path.isdir(text):
        tars = sorted(name for name in os.listdir(text) if name.endswith(".tar"))
        listing.skip(WHERE, text, [name for name in tars if listing.hidden(name)])
        names = [os.path.join(text, name) for name in tars if not listing.hidden(name)]
    else:
        names = [name for one in _expanded(text) for name in _matching(one, text)]
    if not names:
        raise ValueError(f"{WHERE}: got {text!r}, takes a folder that holds *.tar shards")
    return [listing.regular(name, WHERE) for name in dict.fromkeys(names)]


def _matching(name: str, text: str) -> list[str]:
    matching = [name]
    if not os.path.lexists(name):
        matching = sorted(glob.glob(name.replace("[", "[[]"))) if re.search(r"[*?]", name) else []
    if not matching:
        raise ValueError(f"{WHERE}: got {text!r}, but {name!r} is no file")
    return matching


def _expanded(pattern: str) -> list[str]:
    """Expand braces as a shell does."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None or os.path.lexists(pattern):
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if numbers:
        first, last = numbers.groups()
        padded = any(n.startswith("0") and len(n) > 1 for n in (first, last))
        width = max(len(first), len(last)) if padded else 0
        options = [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)]
    else:
        options = braces[1].split(",")
    if not options or (len(options) == 1 and not numbers):
        raise ValueError(f"{WHERE}: got {pattern!r}, braces take {{000..127}} or {{a,b}}")
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [one for option in options for one in _expanded(f"{before}{option}{after}")]


def damaged(path: Path, why: object) -> ValueError:
    return ValueError(
        f"shard {str(path)!r} is truncated or damaged ({why}); delete it or write it again"
    )


def indices(shards: Sequence[Path]) -> list[list[Sample]]:
    """`index` of each shard; prints a message on hidden members."""
    skipped: list[str] = []
    samples = [index(shard, skipped) for shard in shards]
    listing.skip(WHERE, f"{shards[0]}, ..." if len(shards) > 1 else shards[0], skipped)
    return samples


def index(path: str | Path, skipped: list[str] | None = None) -> list[Sample]:
    """The samples of a shard; the names of hidden members are appended to `skipped`.

    Raises ValueError if the shard is truncated, damaged or not an uncompressed tar. Every member
    must be complete and every byte after the last one zero, because tarfile takes a damaged header
    for the end.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if file.read(6).startswith(COMPRESSED):
            raise ValueError(f"shard {str(path)!r} is compressed, takes a plain tar")
        # tarfile itself accepts an archive that ends between two members.
        file.seek(max(0, size - 2 * BLOCK))
        if size < 2 * BLOCK or any(file.read()):
            raise damaged(path, f"it lacks the end of an archive at byte {size}")
        members, end = _members(path)
        for member in members:
            _extended(path, file, member)
        file.seek(end)
        while part := file.read(1 << 20):
            if any(part):
                place = file.tell() - len(part.lstrip(b"\0"))
                raise damaged(path, f"no member and no end at byte {place}")
    return _samples(path, members, skipped if skipped is not None else [])


def _members(path: Path) -> tuple[list[tarfile.TarInfo], int]:
    """All members that tarfile finds, and the byte after the last."""
    members, end = [], 0
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.size < 0 or member.offset < end:  # tarfile would read it again and again
                    raise damaged(path, f"a member of negative size at byte {member.offset}")
                members.append(member)
                end = member.offset_data
                if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:
                    end += -(-member.size // BLOCK) * BLOCK
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        if isinstance(error, ValueError) and str(error).startswith("shard "):
            raise
        raise damaged(path, f"{error}, after byte {end}") from error
    return members, end


def _extended(path: Path, file: BinaryIO, member: tarfile.TarInfo) -> None:
    """Refuse a damaged extended header, of which tarfile would use the readable part."""
    place, main = member.offset, member.offset_data - BLOCK
    while place < main:
        file.seek(place)
        header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
        records = file.read(header.size)
        while header.type == tarfile.XHDTYPE and records:
            record = re.match(rb"(\d{1,19}) ([^=\n]+)=", records)
            length = int(record[1]) if record else 0
            key = record[2].decode(errors="replace") if record else ""
            known = key in KEYS or "." in key
            if not (known and record and record.end() < length <= len(records)) or (
                records[length - 1 : length] != b"\n"
            ):
                raise damaged(path, f"an extended header that cannot be read at byte {place}")
            records = records[length:]
        place += BLOCK + -(-header.size // BLOCK) * BLOCK


def _samples(path: Path, members: list[tarfile.TarInfo], skipped: list[str]) -> list[Sample]:
    samples: dict[str, Sample] = {}
    places: dict[str, tuple[int, int]] = {}
    for member in members:
        if member.isdir():
            continue
        folder, name = os.path.split(member.name)
        if any(listing.hidden(part) for part in member.name.split("/") if part != "."):
            skipped.append(member.name)
            continue
        place = places[os.path.normpath(member.name)] = _place(path, member, places)
        stem, dot, suffix = name.partition(".")
        if not dot:
            continue
        key = os.path.join(folder, stem)
        files = samples.setdefault(key, Sample(key, {})).files
        if suffix.lower() in files:
            raise ValueError(f"shard {str(path)!r}: holds {member.name!r} twice")
        files[suffix.lower()] = place
    return list(samples.values())


def _place(
    path: Path, member: tarfile.TarInfo, places: dict[str, tuple[int, int]]
) -> tuple[int, int]:
    """The place of a member's content; for a link, that of the earlier member that it names."""
    what = f"shard {str(path)!r}: {member.name!r} is"
    if member.issparse():
        raise ValueError(f"{what} a sparse file, takes whole ones: write it without --sparse")
    if member.isreg():
        return member.offset_data, member.size
    if not (member.islnk() or member.issym()):
        raise ValueError(f"{what} neither a file nor a link to one, takes files")
    folder = os.path.dirname(member.name) if member.issym() else ""
    target = os.path.normpath(os.path.join(folder, member.linkname))
    if target not in places:
        raise ValueError(
            f"{what} a link to {member.linkname!r}, which does not come before it in the shard: "
            "write it with --dereference"
        )
    return places[target]


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

    The places are in arrays, because each worker of a DataLoader would copy millions of small
    objects. Raises ValueError if a sample has no such file, unless it is `optional`, and for a file
    of more than max_bytes, because it is read as a whole.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        samples: Sequence[Sequence[Sample]],
        suffixes: Sequence[str],
        max_bytes: int,
        optional: bool = False,
    ) -> None:
        self.shards, self.suffixes = list(shards), tuple(suffixes)
        rows, keys = [], []
        for number, (shard, its_samples) in enumerate(zip(shards, samples, strict=True)):
            for sample in its_samples:
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
                if rows[-1][3] > max_bytes:
                    raise ValueError(
                        f"shard {str(shard)!r}: sample {sample.key!r} has a .{suffix} of "
                        f"{rows[-1][3]} bytes, takes at most {max_bytes} (data.max_bytes)"
                    )
        self.rows, self.keys = np.array(rows, dtype=np.int64).reshape(-1, 4), np.array(keys)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, number: int) -> str:
        shard, key = self.shards[self.rows[number, 0]], os.fsdecode(bytes(self.keys[number]))
        return f"shard {str(shard)!r}, sample {key!r}"

    def read(self, number: int) -> tuple[str, bytes]:
        """(suffix, content); ("", b"") if the sample has no such file."""
        shard, suffix, offset, size = self.rows[number].tolist()
        if suffix < 0:
            return "", b""
        return self.suffixes[suffix], read(self.shards[shard], (offset, size))


def _listed(suffixes: Sequence[str]) -> str:
    return ", ".join(f".{suffix}" for suffix in suffixes)
