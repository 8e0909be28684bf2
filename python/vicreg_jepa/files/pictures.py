"""Decodes an image of any format and depth to 8-bit RGB, upright and cropped to its central square.
An image that is too large is refused before it is decoded.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
WHITE_IS_ZERO = 0


class Refused(ValueError):
    """The message continues a sentence that begins with the name of the image."""


@dataclass(frozen=True)
class Limits:
    """Limits of reading. white: the value of white in images of more than 8 bits; None: all bits
    set in 16-bit images, 1 in floating-point images. max_pixels: of an image or a video frame.
    max_bytes: of a file in a shard, and of an array that is unpacked.
    """

    white: float | None = None
    max_pixels: int = 100_000_000
    max_bytes: int = 2**31

    def check(self, width: int, height: int) -> None:
        """Raises Refused for more than max_pixels."""
        if width * height > self.max_pixels:
            raise Refused(
                f"has {width} x {height} pixels, takes at most {self.max_pixels} (data.max_pixels)"
            )


DEFAULT = Limits()


def pillow() -> Any:
    """Pillow's module Image. Raises ImportError that says what to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"images need Pillow: pip install pillow ({error})") from error
    return Image


@contextmanager
def own_bound() -> Iterator[None]:
    """A context in which Pillow's own limit is off, because `Limits` limits the size of an
    image.
    """
    image = pillow()
    before, image.MAX_IMAGE_PIXELS = image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        image.MAX_IMAGE_PIXELS = before


def decoded(image: Any, size: int, limits: Limits = DEFAULT) -> NDArray[np.uint8]:
    """Decode a Pillow image that has been opened but not decoded yet to [size, size, 3].

    Raises Refused for an image that `limits` exclude, and Pillow's own errors if it cannot be
    decoded.
    """
    limits.check(*image.size)
    if image.format == "PNG":
        _check_png(image.fp)
    image.draft("RGB", (size, size))  # a JPEG is decoded only as finely as needed
    image.load()  # decoding turns a TIFF upright and drops its tag
    return square(_of_8_bits(image, limits.white), size, image.getexif().get(ORIENTATION, 1))


def _check_png(file: IO[bytes]) -> None:
    """Check all checksums; Pillow skips those of the pixels. The position in the file is
    restored.
    """
    place = file.tell()
    file.seek(8)
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", _exactly(file, 8))
        checksum = zlib.crc32(kind)
        while length:
            part = _exactly(file, min(length, 1 << 20))
            checksum, length = zlib.crc32(part, checksum), length - len(part)
        if _exactly(file, 4) != checksum.to_bytes(4, "big"):
            raise Refused(f"is damaged before byte {file.tell()}: a checksum is wrong")
    file.seek(place)


def _exactly(file: IO[bytes], count: int) -> bytes:
    content = file.read(count)
    if len(content) != count:
        raise Refused("is truncated")
    return content


def square(image: Any, size: int, orientation: int = 1) -> NDArray[np.uint8]:
    """[size, size, 3]: the central square of a Pillow image, turned as EXIF's orientation says."""
    from PIL import ImageOps

    upright = image.convert("RGB")
    turn = _TURNS.get(orientation)
    if turn is not None:
        upright = upright.transpose(turn)
    return np.asarray(ImageOps.fit(upright, (size, size)))


# EXIF orientation -> the value of Pillow's Transpose: flips, ROTATE_180, TRANSPOSE, ROTATE_270 ...
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}


def _of_8_bits(image: Any, white: float | None) -> Any:
    """Scale values of more than 8 bits, which Pillow would clip, so that white becomes 255."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    full = _full(image) if white is None else white
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= full):  # not where a value is NaN either
        raise Refused(
            f"holds values from {low:.6g} to {high:.6g}, takes 0 to {full:.6g}: data.white says "
            "which value is white"
        )
    inverse = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO
    levels = np.empty(values.shape, np.uint8)
    rows = max(1, 2**20 // values.shape[1])  # float64 of all rows is eight times as large
    for row in range(0, len(values), rows):
        part = values[row : row + rows].astype(np.float64)
        part = full - part if inverse else part
        levels[row : row + rows] = (part * (255 / full)).round()
    return pillow().fromarray(levels)


def _full(image: Any) -> float:
    """The value of white by the format of the image."""
    if image.mode == "F":
        return 1.0
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(BITS, (16,))[0]
        return float(2**bits - 1)
    if image.format == "PNG":  # older versions of Pillow open 16 bits like this
        return 65535.0
    raise Refused("has 32-bit or signed values and does not say which is white: set data.white")
