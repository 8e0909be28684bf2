"""Video files as they come: with a cover, with damaged frames, behind links, larger than memory."""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vicreg_jepa import config
from vicreg_jepa.data import video_decoders, videos
from vicreg_jepa.data.video_containers import check_whole
from vicreg_jepa.data.video_decoders import Recording
from vicreg_jepa.files.pictures import Limits

from tests.trainer.test_tars import tar_of

try:
    import av
except ImportError:
    av = None
decoding = pytest.mark.skipif(av is None, reason="needs PyAV")


def encode(format: str = "mp4", codec: str = "mpeg4", frames: int = 24, streams=((48, 32, 0),)):
    """Streams of (width, height, grey of the first frame), 10 more each frame, and a pattern."""
    packed = io.BytesIO()
    with av.open(packed, "w", format=format) as container:
        made = []
        for width, height, _ in streams:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.gop_size = 12
            made.append(stream)
        for number in range(frames):
            for stream, (width, height, first) in zip(made, streams, strict=True):
                picture = np.full((height, width, 3), min(255, first + 10 * number), np.uint8)
                picture[:8, 8:16] = 255 - picture[:8, 8:16]
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture)):
                    container.mux(packet)
        for stream in made:
            container.mux(stream.encode())
    return packed.getvalue()


def greys(video: Recording, count: int) -> list[int]:
    return video[0:count][:, 12, 12, 0].astype(int).tolist()


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def with_cover(film: bytes) -> bytes:
    """An .mp4 whose tags, with a cover, come before its tracks, as cameras and mutagen write it."""
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 200, 200)).save(jpeg, "JPEG")
    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0) + jpeg.getvalue()))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", cover)))
    at = film.index(b"moov") - 4
    (size,) = struct.unpack(">I", film[at : at + 4])
    (header,) = struct.unpack(">I", film[at + 8 : at + 12])  # mvhd comes first
    inside = film[at + 8 : at + 8 + header] + tags + film[at + 8 + header : at + size]
    return film[:at] + box(b"moov", inside) + film[at + size :]


@decoding
def test_a_cover_is_not_the_film():
    film = encode()
    decoded = video_decoders.PyAV("v", with_cover(film), 16)
    with av.open(io.BytesIO(with_cover(film))) as container:
        assert container.streams.video[0].codec_context.name == "mjpeg"  # the cover comes first
    plain = video_decoders.PyAV("v", film, 16)
    assert (len(decoded), greys(decoded, 5)) == (24, greys(plain, 5))


@decoding
def test_a_file_with_a_cover_alone_has_no_film():
    packed = io.BytesIO()
    with av.open(packed, "w", format="adts") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"video v: cannot be decoded \(it has no video stream"):
        len(video_decoders.PyAV("v", packed.getvalue(), 16))


@decoding
def test_of_two_films_it_is_the_one_that_ffmpeg_takes():
    film = encode("matroska", streams=((16, 16, 100), (96, 64, 0)))
    with av.open(io.BytesIO(film)) as container:
        best = container.streams.best("video").index
        number = [s.index for s in container.streams.video].index(best)
    first = greys(video_decoders.PyAV("v", film, 16), 1)[0]
    assert abs(first - (100, 0)[number]) < 8


@decoding
@pytest.mark.parametrize("format", ["mp4", "avi", "matroska"])
def test_a_frame_that_cannot_be_decoded_is_named(format):
    """FFmpeg hides what it cannot decode behind the frame before, and says so in a flag; what
    builds on such a frame is wrong as well, without one."""
    whole = encode(format)
    rng = np.random.default_rng(0)
    with av.open(io.BytesIO(whole)) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    place, size = places[6]
    hurt = bytearray(whole)
    noise = rng.integers(0, 256, size - 8, dtype=np.uint8).tobytes()
    hurt[place + 6 : place + size - 2] = noise
    good = video_decoders.PyAV("v", whole, 16)[0:24]
    video = video_decoders.PyAV("v", bytes(hurt), 16)
    assert np.array_equal(video[0:5], good[0:5])
    named = r"video v: cannot be decoded \((frame \d+ is damaged|.*Invalid data)"
    for frames in (slice(0, 24), slice(6, 7), slice(8, 10)):
        with pytest.raises(ValueError, match=named):
            video[frames]


@decoding
def test_a_frame_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    film = encode(frames=3)
    named = r"video v: has 48 x 32 pixels, takes at most 1535 \(data\.max_pixels\)"
    for call in (len, lambda video: video[0:1]):
        with pytest.raises(ValueError, match=named):
            call(video_decoders.PyAV("v", film, 16, Limits(max_pixels=1535)))
    assert len(video_decoders.PyAV("v", film, 16, Limits(max_pixels=1536))) == 3


@decoding
@pytest.mark.parametrize("name", ["clip [v2]", "100%d", "a:b", "näme", "concat:x", "-"])
def test_names_of_any_characters(name, tmp_path, monkeypatch):
    (tmp_path / f"{name}.mp4").write_bytes(encode(frames=3))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, Path()):
        source = videos.VideoFolder(folder, 16, "pyav")
        assert [len(source[n]) for n in range(len(source))] == [3]
        assert source[0][0:3].shape == (3, 16, 16, 3)


@decoding
def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"\xff.mp4")
    (tmp_path / name).write_bytes(encode(frames=3))
    assert len(videos.VideoFolder(tmp_path, 16, "pyav")[0]) == 3


@decoding
@pytest.mark.parametrize("format", ["mp4", "avi", "matroska"])
def test_a_film_that_is_cut_between_two_frames(format, tmp_path):
    """FFmpeg shows the frames that are left, and says nothing."""
    whole = encode(format) if format != "mp4" else _faststart(tmp_path)
    assert len(video_decoders.PyAV("v", whole, 16)) == 24
    with av.open(io.BytesIO(whole)) as container:
        places = [p.pos for p in container.demux(video=0) if p.size]
    for place in (places[20], places[23]):
        for source in (whole[:place], tmp_path / "x"):
            (tmp_path / "x").write_bytes(whole[:place])
            with pytest.raises(ValueError, match="cannot be decoded"):
                len(video_decoders.PyAV("v", source, 16))


def _faststart(folder: Path) -> bytes:
    path = folder / "film.mp4"
    with (
        av.open(io.BytesIO(encode("mp4"))) as film,
        av.open(path, "w", options={"movflags": "faststart"}) as copy,
    ):
        stream = copy.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    return path.read_bytes()


def boxes(*parts: tuple[bytes, int]) -> bytes:
    return b"".join(struct.pack(">I", length) + kind + bytes(8) for kind, length in parts)


@pytest.mark.parametrize(
    ("content", "whole"),
    [
        (b"RIFF" + struct.pack("<I", 4) + b"AVI ", True),
        (b"RIFF" + struct.pack("<I", 5) + b"AVI ", False),
        (b"RIFF" + bytes(8), True),  # written where it could not go back
        (b"\x1a\x45\xdf\xa3\x81x\x18\x53\x80\x67\x83abc", True),
        (b"\x1a\x45\xdf\xa3\x81x\x18\x53\x80\x67\x84abc", False),
        (b"\x1a\x45\xdf\xa3\x81x\x18\x53\x80\x67\x01" + b"\xff" * 7 + b"abc", True),  # live
        (b"\x1a\x45\xdf\xa3", True),
        (boxes((b"ftyp", 16), (b"moov", 16), (b"mdat", 16)), True),
        (boxes((b"ftyp", 16), (b"moov", 16), (b"mdat", 17)), False),
        (boxes((b"ftyp", 16), (b"moov", 16), (b"mdat", 0)), True),
        (boxes((b"ftyp", 16), (b"mdat", 1))[:-8] + struct.pack(">Q", 16), True),
        (boxes((b"ftyp", 16), (b"mdat", 1))[:-8] + struct.pack(">Q", 2**40), False),
        (boxes((b"ftyp", 16), (b"junk", 99)), True),
        (b"", True),
        (b"GIF89a", True),
    ],
)
def test_how_long_a_film_says_that_it_is(content, whole):
    if whole:
        check_whole(content)
    else:
        with pytest.raises(ValueError, match=rf"it is truncated: {len(content)} bytes of"):
            check_whole(content)


# ------------------------------------------------------------------------------- which files


@pytest.fixture
def undecoded(monkeypatch):
    """Any decoder: files are listed, not opened."""
    monkeypatch.setattr(videos, "decoder", lambda name: video_decoders.PyAV)


def test_hidden_and_linked_videos(undecoded, tmp_path, capsys):
    real, root = tmp_path / "real", tmp_path / "videos"
    for path in (real / "a.mp4", real / "deep" / "b.MP4", root / "c.mkv", root / "._c.mkv",
                 root / ".trash" / "d.mp4"):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (root / "set").symlink_to(real)
    (real / "above").symlink_to(root)  # leads back: entered once
    (root / "e.mp4").symlink_to(real / "a.mp4")
    source = videos.VideoFolder(root, 16)
    names = [os.path.relpath(path, root) for path in source.files]
    assert names == ["c.mkv", "e.mp4", "set/a.mp4", "set/deep/b.MP4"]
    told = capsys.readouterr().err
    assert "._c.mkv" in told
    assert ".trash" in told


def test_what_is_no_regular_file_is_refused_unopened(undecoded, tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"a\.mp4' is no regular file"):
        videos.VideoFolder(tmp_path, 16)
    with pytest.raises(ValueError, match=r"a\.mp4' is no regular file"):
        videos.decode(tmp_path / "a.mp4", 16)
    (tmp_path / "a.mp4").unlink()
    (tmp_path / "a.mp4").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"a\.mp4' is a link that leads nowhere"):
        videos.VideoFolder(tmp_path, 16)


# ------------------------------------------------------------------------------- arrays


def npz(array: np.ndarray | bytes, name: str = "video.npy") -> bytes:
    content = io.BytesIO()
    if isinstance(array, bytes):
        content.write(array)
    else:
        np.save(content, array)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content.getvalue())
    return packed.getvalue()


def header(shape: tuple[int, ...]) -> bytes:
    """Of an array so large, without it."""
    packed = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        packed, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return packed.getvalue()


def shard(root: Path, content: bytes, **limits: int) -> videos.VideoShards:
    (root / "a.tar").write_bytes(tar_of({"0.npz": content}))
    return videos.VideoShards(root, 16, limits=Limits(**limits))


FRAMES = np.arange(4 * 16 * 16 * 3, dtype=np.uint8).reshape(4, 16, 16, 3)


def test_an_array_is_bounded_before_it_is_unpacked(tmp_path):
    assert np.array_equal(shard(tmp_path, npz(FRAMES))[0][:], FRAMES)
    assert np.array_equal(shard(tmp_path, npz(np.asfortranarray(FRAMES)))[0][:], FRAMES)
    assert np.array_equal(shard(tmp_path, npz(FRAMES), max_bytes=3072)[0][:], FRAMES)
    named = r"a\.tar', sample '0': `video` has 3072 bytes, takes at most 3071 \(data\.max_bytes\)"
    with pytest.raises(ValueError, match=named):
        shard(tmp_path, npz(FRAMES), max_bytes=3071)[0]
    bomb = npz(np.zeros((300, 512, 512, 3), np.uint8))  # 236 MB in 229 kB
    assert len(bomb) < 300_000
    with pytest.raises(ValueError, match=r"has 235929600 bytes, takes at most 1000000 "):
        shard(tmp_path, bomb, max_bytes=10**6)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header((10**6, 10**4, 10**4, 3)), "has 300000000000000 bytes, takes at most"),
        (header((2**62, 2, 2, 3)), "bytes, takes at most"),
        (header((4, 16, 16, 3)), "has 0 bytes of the 3072"),
        (header((4, 16, 16, 3)) + bytes(3073), "has 3073 bytes of the 3072"),
        (header((4, 16, 16)) + bytes(1024), r"is uint8 \[4, 16, 16\], takes uint8"),
        (header((0, 16, 16, 3)), r"is uint8 \[0, 16, 16, 3\], takes uint8"),
        (b"\x93NUMPY\x01\x00" + b"\xff\xff" + b"{" * 65535, r"Header info length[^\n]*$"),
        (b"no array", "magic string"),
    ],
)
def test_headers_that_lie_are_named(content, message, tmp_path):
    with pytest.raises(ValueError, match=r"a\.tar', sample '0'.*" + message):
        shard(tmp_path, npz(content))[0]


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    with pytest.raises(ValueError, match=r"sample '0': `video` is object"):
        shard(tmp_path, npz(np.array([{}, {}], dtype=object)))[0]
    with pytest.raises(ValueError, match=r"sample '0': holds no array `video`"):
        shard(tmp_path, npz(FRAMES, "other.npy"))[0]


def test_a_file_in_a_shard_is_bounded(tmp_path):
    content = npz(np.random.default_rng(0).integers(0, 256, FRAMES.shape, np.uint8))
    named = re.escape(f"has a .npz of {len(content)} bytes, takes at most 999 (data.max_bytes)")
    with pytest.raises(ValueError, match=named):
        shard(tmp_path, content, max_bytes=999)


def test_the_bounds_are_settings(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"0.npz": npz(FRAMES)}))
    words = ["data.kind=webdataset", f"data.path={tmp_path}", "data.max_bytes=3000"]
    with pytest.raises(ValueError, match="takes at most 3000"):
        videos.of(config.load("vjepa_large_videos", words))[0]
