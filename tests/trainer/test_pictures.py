"""Pictures as they are meant: of any depth, upright, within bounds; and which files are taken."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from vicreg_jepa import config
from vicreg_jepa.data import image_files, sources
from vicreg_jepa.files.pictures import Limits

RAMP = np.linspace(0, 1, 64)[None].repeat(64, 0)


def read(path: Path, content: bytes, **limits) -> torch.Tensor:
    """float [3, 64, 64], as a training on a folder sees it."""
    for name in "ab":
        (path.parent / name).mkdir(exist_ok=True)
        (path.parent / name / path.name).write_bytes(content)
    return image_files.stored("x", image_files.ImageFolder(path.parent), 64, Limits(**limits))[[0]][
        0
    ]


def packed(array: np.ndarray, format: str, **words) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **words)
    return buffer.getvalue()


def big_endian(values: np.ndarray) -> bytes:
    """A TIFF of 16 bits, MM."""
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1),
            (278, height), (279, 2 * values.size)]  # fmt: skip
    pixels = values.astype(">u2").tobytes()
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    head = struct.pack(">2sHI", b"MM", 42, 8 + len(pixels))
    return head + pixels + struct.pack(">H", len(tags)) + entries + bytes(4)


def rgb_16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    chunks = (
        struct.pack(">I", len(z)) + k + z + struct.pack(">I", zlib.crc32(k + z)) for k, z in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def photometric(tiff: bytes, value: int) -> bytes:
    at = tiff.index(struct.pack("<HHI", 262, 3, 1)) + 8
    return tiff[:at] + struct.pack("<H", value) + tiff[at + 2 :]


SHORT = (RAMP * 65535).round().astype(np.uint16)
FLOAT = RAMP.astype(np.float32)
DEEP = {
    "8.png": (packed((RAMP * 255).round().astype(np.uint8), "PNG"), {}),
    "16.png": (packed(SHORT, "PNG"), {}),
    "16rgb.png": (rgb_16(np.stack([SHORT] * 3, -1)), {}),
    "16.tif": (packed(SHORT, "TIFF"), {}),
    "16lzw.tif": (packed(SHORT, "TIFF", compression="tiff_lzw"), {}),
    "16be.tiff": (big_endian(SHORT), {}),
    "16inverse.tif": (photometric(packed(65535 - SHORT, "TIFF"), 0), {}),
    "12in16.png": (packed((RAMP * 4095).round().astype(np.uint16), "PNG"), {"white": 4095}),
    "32.tif": (packed((RAMP * 1e6).astype(np.int32), "TIFF"), {"white": 1e6}),
    "float.tif": (packed(FLOAT, "TIFF"), {}),
    "float1000.tif": (packed(FLOAT * 1000, "TIFF"), {"white": 1000}),
}


@pytest.mark.parametrize("name", DEEP)
def test_pictures_of_any_depth_keep_their_shades(name, tmp_path):
    if "lzw" in name and not features.check("libtiff"):
        pytest.skip("Pillow without libtiff")
    content, limits = DEEP[name]
    picture = read(tmp_path / name, content, **limits)
    expected = torch.tensor(RAMP, dtype=torch.float32).expand(3, -1, -1)
    torch.testing.assert_close(
        picture, expected, rtol=0, atol=0.6 / 255 if name[:2] != "16" else 1 / 255
    )


@pytest.mark.parametrize(
    ("array", "limits", "message"),
    [
        ((RAMP * 1e6).astype(np.int32), {}, "32-bit.*data.white"),
        ((RAMP * 1e6 - 9).astype(np.int32), {"white": 1e6}, "from -9 to 999991, takes 0 to 1e.06"),
        (FLOAT * 65535, {}, r"from 0 to 65535, takes 0 to 1\b.*data.white"),
        (FLOAT - 0.5, {}, r"from -0.5 to 0.5, takes 0 to 1\b"),
        (FLOAT * np.nan, {}, "from nan to nan"),
        (FLOAT * np.float32(3e38), {}, "takes 0 to 1"),
        (SHORT, {"white": 4095}, "from 0 to 65535, takes 0 to 4095"),
    ],
)
def test_shades_beyond_white_are_refused(array, limits, message, tmp_path):
    with pytest.raises(ValueError, match=rf"x\.tif.*{message}"):
        read(tmp_path / "x.tif", packed(array, "TIFF"), **limits)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation, format, tmp_path):
    """However a camera was held: the stored pixels are turned back by what EXIF says."""
    upright = Image.new("L", (64, 64), 30)
    upright.paste(220, (0, 0, 32, 16))  # above at the left, lying
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    image = upright.transpose(turned[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    image.save(content, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    picture = read(tmp_path / f"x.{format.lower()}", content.getvalue())[0]
    expected = torch.from_numpy(np.array(upright)).float() / 255
    torch.testing.assert_close(picture, expected, rtol=0, atol=0.1 if format == "JPEG" else 0)


def test_a_deep_picture_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    Image.fromarray(np.rot90(SHORT).copy()).save(content, "PNG", exif=exif)
    picture = read(tmp_path / "x.png", content.getvalue())[0]
    torch.testing.assert_close(picture, torch.tensor(RAMP).float(), rtol=0, atol=1 / 255)


def test_twelve_bits_are_scaled_by_twelve(tmp_path):
    tags = [(256, 64), (257, 64), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 64),
            (279, 96 * 64)]  # fmt: skip
    rows = b"\xff" * 96 * 32 + b"\0" * 96 * 32
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(rows))
    content = head + rows + struct.pack("<H", len(tags)) + entries + bytes(4)
    picture = read(tmp_path / "x.tif", content)[0]
    assert picture[:32].eq(1).all()
    assert picture[32:].eq(0).all()


def png_of(width: int, height: int) -> bytes:
    """So large by its header; a few bytes of it."""
    content = bytearray(packed(np.zeros((4, 4), np.uint8), "PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


def test_large_pictures_are_refused_before_they_are_decoded(tmp_path):
    begin = time.process_time()
    for width, height in ((13000, 13000), (100001, 1000), (2**30, 2**30), (2**31 - 1, 1)):
        with pytest.raises(ValueError, match=rf"{width} x {height} pixels.*data\.max_pixels"):
            read(tmp_path / "x.png", png_of(width, height))
    assert time.process_time() - begin < 2
    small = packed(np.zeros((20, 50), np.uint8), "PNG")
    with pytest.raises(ValueError, match=r"50 x 20 pixels, takes at most 999 .*data\.max_pixels"):
        read(tmp_path / "x.png", small, max_pixels=999)
    assert read(tmp_path / "x.png", small, max_pixels=1000).shape == (3, 64, 64)
    # more than Pillow's own bound, where the setting says so: then what is missing is the trouble
    with pytest.raises(ValueError, match="is not an image Pillow reads"):
        read(tmp_path / "x.png", png_of(20000, 10000), max_pixels=2 * 10**8)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_the_limits_are_settings(tmp_path):
    root = folder(tmp_path)
    words = [f"data.path={root}", "data.kind=images", "data.max_pixels=63", "data.white=4095"]
    made = config.load("vicreg_digits", words)
    train, _ = sources.images(made)
    assert train.limits == Limits(white=4095, max_pixels=63)
    with pytest.raises(ValueError, match=r"data\.max_pixels"):
        train[[0]]
    for word in ("data.white=0", "data.max_pixels=0", "data.max_bytes=0", "data.white=nan"):
        with pytest.raises(config.ConfigError, match=word.split("=")[0]):
            config.load("vicreg_digits", ["data.kind=images", f"data.path={root}", word])
    with pytest.raises(config.ConfigError, match="max_pixels: got '9', but it is used"):
        config.load("vicreg_digits", ["data.max_pixels=9"])


# ------------------------------------------------------------------------------- which files


def folder(root: Path, classes: str = "ab", each: int = 2) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            (root / name / f"{number}.png").write_bytes(packed(np.zeros((8, 8), np.uint8), "PNG"))
    return root


def test_hidden_files_are_skipped_with_a_word(tmp_path, capsys):
    root = folder(tmp_path)
    folder(root, classes=(".ipynb_checkpoints", "@eaDir", "__MACOSX"))
    folder(root / "a", classes=(".ipynb_checkpoints",))
    (root / "b" / "._0.png").write_bytes(b"\0\5\x16\7")
    (root / "b" / ".DS_Store").write_bytes(b"no picture")
    images = image_files.ImageFolder(root)
    assert images.classes == ("a", "b")
    assert len(images) == 4
    told = capsys.readouterr().err
    assert "5 hidden files are skipped" in told
    assert ".ipynb_checkpoints" in told
    assert len(told.splitlines()) == 1


def test_pictures_that_belong_to_no_class_are_named(tmp_path, capsys):
    root = folder(tmp_path)
    (root / "cover.jpg").write_bytes(b"x")
    assert len(image_files.ImageFolder(root)) == 4
    assert "1 picture beside the class folders is left out ('cover.jpg')" in capsys.readouterr().err


def test_nested_and_linked_pictures_are_taken(tmp_path):
    real = folder(tmp_path / "real", each=3)
    folder(real / "a", classes=("deep",), each=1)
    links = tmp_path / "links"
    links.mkdir()
    (links / "x").symlink_to(real / "a")
    (links / "y").mkdir()
    (links / "y" / "0.png").symlink_to(real / "b" / "0.png")
    (links / "y" / "more").symlink_to(real / "b")
    (links / "y" / "again").symlink_to(links / "y")  # leads back: entered once
    images = image_files.ImageFolder(links)
    assert images.classes == ("x", "y")
    names = [os.path.relpath(images.where(n), links) for n in range(len(images))]
    assert names == ["x/0.png", "x/1.png", "x/2.png", "x/deep/0.png", "y/0.png", "y/more/0.png",
                     "y/more/1.png", "y/more/2.png"]  # fmt: skip
    assert image_files.stored("x", images, 8)[range(8)].shape == (8, 3, 8, 8)


def test_what_is_no_regular_file_is_refused_unopened(tmp_path):
    root = folder(tmp_path)
    os.mkfifo(root / "a" / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png' is no regular file"):
        image_files.ImageFolder(root)
    (root / "a" / "pipe.png").unlink()
    (root / "a" / "gone.png").symlink_to("/nowhere/x.png")
    with pytest.raises(ValueError, match=r"gone\.png' is a link that leads nowhere"):
        image_files.ImageFolder(root)


@pytest.mark.parametrize("name", ["pictures [v2]", "a{0..1}*?", "näme\nwith lines", "100%d"])
def test_names_of_any_characters(name, tmp_path):
    root = folder(tmp_path / name, classes=[name, "b"])
    (root / "b" / os.fsdecode(b"\xff[1].png")).write_bytes((root / "b" / "0.png").read_bytes())
    stored = image_files.stored("x", image_files.ImageFolder(root), 8)
    assert stored[range(5)].shape == (5, 3, 8, 8)
