"""The size that a video file should have by its own headers: FFmpeg decodes a file that was
truncated between two frames without an error.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO

MATROSKA, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"udta", b"sidx", b"mfra")
MOST_BOXES = 100_000


def check_whole(source: bytes | str | Path) -> None:
    """Raises ValueError for a truncated Matroska, AVI or MP4 file; other formats are not
    checked.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        declared = _declared(file, size)
    if declared > size:
        raise ValueError(f"it is truncated: {size} bytes of {declared}")


def _declared(file: IO[bytes], size: int) -> int:
    head = file.read(256)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == MATROSKA:  # its header, then one segment
        place, length = _vint(head, 4)
        if length is None or head[place + length :][:4] != SEGMENT:
            return 0
        place, length = _vint(head, place + length + 4)
        return 0 if length is None else place + length
    return _boxes(file, size)


def _boxes(file: IO[bytes], size: int) -> int:
    """The end of the last of an MP4's boxes."""
    place = 0
    for _ in range(MOST_BOXES):
        file.seek(place)
        head = file.read(16)
        if head[4:8] not in BOXES:
            return 0  # another format, or something behind the film
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        place += length
        if length < 8 or place >= size:  # 0: to the end of the file
            break
    return place


def _vint(head: bytes, place: int) -> tuple[int, int | None]:
    """(the place after it, the value) of an EBML number of variable length; None: an unknown
    size.
    """
    width = 9 - head[place].bit_length() if place < len(head) else 9
    number = int.from_bytes(head[place : place + width], "big") & ((1 << 7 * width) - 1)
    unknown = width > 8 or number == (1 << 7 * width) - 1
    return place + width, None if unknown else number
