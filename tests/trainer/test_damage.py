"""Damaged files: a bit flipped, a byte changed, a cut, at every kind of place of all that is read.

The rule: what is read is what was written, or a ValueError names the file. Where a format has no
checksum (the pixels of a JPEG, the contents of a tar's members) nobody can tell, and what is read
must still be whole in its shape. VICREG_KERNELS_FUZZ=100 makes a hundred times as many damages; a
failure's name holds the seed and the place.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from vicreg_jepa.data import image_files, video_decoders, videos
from vicreg_jepa.files import tar_index
from vicreg_jepa.files.pictures import Limits
from vicreg_jepa.training import checkpoint

from tests.trainer.test_tars import tar_of

try:
    import av
except ImportError:
    av = None

TIMES = int(os.environ.get("VICREG_KERNELS_FUZZ", "1"))
SEED = int(os.environ.get("VICREG_KERNELS_FUZZ_SEED", "0"))


@dataclass(frozen=True)
class Kind:
    """content: of the file; read: what a run gets from it, given its path; checked: the share of
    the file, as (begin, end) places, whose damage must be seen; the rest has no checksum.
    """

    name: str
    content: Callable[[], bytes]
    read: Callable[[Path], Any]
    checked: Callable[[bytes], list[tuple[int, int]]]
    cuts: bool = True  # whether a cut must be seen


def everything(content: bytes) -> list[tuple[int, int]]:
    return [(0, len(content))]


def nothing(content: bytes) -> list[tuple[int, int]]:
    return []


# ------------------------------------------------------------------------------------------ tars

FILES = {f"{n}.{s}": bytes(40 + n) for n in range(3) for s in ("png", "json")}


def read_tar(path: Path) -> dict[str, dict[str, int]]:
    """Sizes, not contents: of those a tar has no checksum."""
    entries = tar_index.index(path)
    for sample in entries:
        for place in sample.files.values():
            tar_index.read(path, place)
    return {sample.key: {k: size for k, (_, size) in sample.files.items()} for sample in entries}


def headers(content: bytes) -> list[tuple[int, int]]:
    """All but the contents of members, which are padded to whole blocks, and of the extended
    headers' values."""
    with tarfile.open(fileobj=io.BytesIO(content)) as shard:
        places = [(m.offset_data - 512, m.offset_data, m.offset_data + 512) for m in shard]
    return [(begin, end) for begin, end, _ in places] + [(places[-1][2], len(content))]


TARS = [
    Kind("tar", lambda: tar_of(FILES), read_tar, headers),
    Kind("tar pax", lambda: tar_of({f"{'x' * 120}/{k}": z for k, z in FILES.items()},
                                   tarfile.PAX_FORMAT), read_tar, headers),
    Kind("tar gnu", lambda: tar_of({f"{'x' * 120}/{k}": z for k, z in FILES.items()},
                                   tarfile.GNU_FORMAT), read_tar, headers),
]  # fmt: skip

# ------------------------------------------------------------------------------------ checkpoints


def saved(name: str) -> Callable[[], bytes]:
    def content() -> bytes:
        with TemporaryDirectory() as folder:
            tensors = {
                "a": torch.arange(12.0).reshape(3, 4),
                "b": torch.zeros(2, dtype=torch.int64),
            }
            path = checkpoint.save(Path(folder), 7, tensors, {"betas": [0.9, 0.999], "name": "x"})
            CHECKPOINT.update({p.name: p.read_bytes() for p in path.iterdir()})
        return CHECKPOINT[name]

    return content


CHECKPOINT: dict[str, bytes] = {}


def _checkpoint(name: str) -> Kind:
    def read(path: Path) -> Any:
        folder = path.parent / "step_00000007"
        folder.mkdir(exist_ok=True)
        for other, content in CHECKPOINT.items():
            (folder / other).write_bytes(path.read_bytes() if other == name else content)
        tensors, step, state = checkpoint.load(folder)
        return {k: (z.dtype, z.tolist()) for k, z in tensors.items()}, step, state

    return Kind(name, saved(name), read, everything)


CHECKPOINTS = [_checkpoint("tensors.safetensors"), _checkpoint("state.json")]

# --------------------------------------------------------------------------------------- pictures


class One:
    """A single picture."""

    classes = ()

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 1

    def picture(self, number: int) -> Any:
        return Image.open(self.path)

    def where(self, number: int) -> str:
        return str(self.path)


def read_picture(path: Path) -> np.ndarray:
    limits = Limits(max_pixels=10**6)  # a bit in a header makes a picture of any size
    return image_files.stored("x", One(path), 16, limits)[[0]].numpy()


def picture(format: str, deep: bool = False, **words: Any) -> Callable[[], bytes]:
    def content() -> bytes:
        rng = np.random.default_rng(0)
        smooth = np.linspace(0, 200, 24 * 20).reshape(24, 20)
        if deep:
            image = Image.fromarray((smooth * 257).astype(np.uint16))
        else:
            pixels = smooth[..., None] + rng.integers(0, 50, (24, 20, 3))
            image = Image.fromarray(pixels.astype(np.uint8))
        packed = io.BytesIO()
        image.save(packed, format, **words)
        return packed.getvalue()

    return content


PICTURES = [
    Kind("png", picture("PNG"), read_picture, everything),
    Kind("png 16", picture("PNG", deep=True), read_picture, everything),
    Kind("jpeg", picture("JPEG"), read_picture, nothing),
    Kind("jpeg progressive", picture("JPEG", progressive=True), read_picture, nothing),
    Kind("tiff", picture("TIFF"), read_picture, nothing),
    Kind("tiff 16", picture("TIFF", deep=True), read_picture, nothing),
    Kind("bmp", picture("BMP"), read_picture, nothing),
    Kind("gif", picture("GIF"), read_picture, nothing),
]
if features.check("webp"):
    PICTURES.append(Kind("webp", picture("WEBP"), read_picture, nothing))

# ----------------------------------------------------------------------------------------- videos


def npz() -> bytes:
    packed = io.BytesIO()
    video = np.arange(3 * 16 * 16 * 3, dtype=np.uint8).reshape(3, 16, 16, 3)
    np.savez_compressed(packed, video=video)
    return packed.getvalue()


def read_npz(path: Path) -> np.ndarray:
    tar = path.with_name("a.tar")
    tar.write_bytes(tar_of({"0.npz": path.read_bytes()}))
    return videos.VideoShards(tar, 16)[0][:]


def film(format: str, codec: str, **options: str) -> Callable[[], bytes]:
    def content() -> bytes:
        with TemporaryDirectory() as folder:
            return made(Path(folder, "film"))

    def made(path: Path) -> bytes:
        with av.open(path, "w", format=format, options=options) as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for number in range(8):
                picture = np.full((32, 32, 3), 20 * number, np.uint8)
                picture[4:12, number : number + 8] = 255
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture)):
                    container.mux(packet)
            container.mux(stream.encode())
        return path.read_bytes()

    return content


def read_film(path: Path) -> np.ndarray:
    film = video_decoders.PyAV(repr(str(path)), path, 16)
    return film[:]


ARRAYS = [Kind("npz", npz, read_npz, everything)]
FILMS = [
    Kind("mp4", film("mp4", "mpeg4", movflags="faststart"), read_film, nothing),
    Kind("mkv", film("matroska", "mpeg4"), read_film, nothing),
    Kind("avi", film("avi", "mpeg4"), read_film, nothing),
]

# ---------------------------------------------------------------------------------------- the rule


def damages(kind: Kind, content: bytes, count: int) -> Iterator[tuple[str, bytes, bool]]:
    """(what was done, the damaged content, whether it must be seen)."""
    rng = np.random.default_rng([SEED, sum(map(ord, kind.name))])
    checked = kind.checked(content)
    # as many places in the first and last bytes, where headers and tables stand, as elsewhere
    edges = [*range(min(64, len(content))), *range(max(0, len(content) - 64), len(content))]
    for number in range(count):
        anywhere = int(rng.integers(len(content)))
        at = int(rng.choice(edges)) if number % 3 == 0 else anywhere
        seen = any(begin <= at < end for begin, end in checked)
        hurt = bytearray(content)
        if number % 4 < 2:
            bit = int(rng.integers(8))
            hurt[at] ^= 1 << bit
            yield f"bit {bit} of byte {at}", bytes(hurt), seen
        elif number % 4 == 2:
            value = int(rng.choice([0, 255, 127, 128]))
            hurt[at] = value
            yield f"byte {at} to {value}", bytes(hurt), seen
        else:
            yield f"cut at {at}", content[:at], kind.cuts


def same(a: Any, b: Any) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


ALL = [*TARS, *CHECKPOINTS, *PICTURES, *ARRAYS, *(FILMS if av else [])]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_damage_is_seen_or_does_none(kind, tmp_path):
    content = kind.content()
    path = tmp_path / f"damaged.{kind.name.split()[0]}"
    path.write_bytes(content)
    good = kind.read(path)
    count = TIMES * (40 if kind in FILMS else 150)
    refused, wrong = 0, []
    for what, hurt, must in damages(kind, content, count):
        path.write_bytes(hurt)
        try:
            outcome = kind.read(path)
        except ValueError as error:
            refused += 1
            if not any(name in str(error) for name in ("damaged.", "step_00000007", "a.tar")):
                wrong.append(f"{what}: does not name the file: {error}")
            continue
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {error}")
            continue
        if must and not same(outcome, good):
            wrong.append(f"{what}: read otherwise, without a word")
        elif isinstance(good, np.ndarray) and outcome.shape[1:] != good.shape[1:]:
            wrong.append(f"{what}: of shape {outcome.shape}")
    assert not wrong, f"seed {SEED}, {len(wrong)} of {count}:\n" + "\n".join(wrong[:20])
    assert refused > count // 8
