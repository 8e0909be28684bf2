"""Clips of video files and shards: the right frames, no more decoded than they need."""

from __future__ import annotations

import io
import re
import sys
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from vicreg_jepa import config
from vicreg_jepa.data import batches, sources, video_decoders, videos

from tests.trainer.test_images import write

av = pytest.importorskip("av")
FRAMES = 24


def encode(first: int = 0, frames: int = FRAMES, rotation: int = 0) -> bytes:
    """An .mp4 of 48 x 32, whose frame i is grey of first + 10 i but for a white corner."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        _encode(path, first, frames, rotation)
        return path.read_bytes()


def _encode(path: Path, first: int, frames: int, rotation: int) -> None:
    # the header first, so that a truncated file can still be opened
    with av.open(path, "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            picture = np.full((32, 48, 3), first + 10 * number, np.uint8)
            picture[:8, 8:16] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture)):
                container.mux(packet)
        container.mux(stream.encode())


def numbers(clip: torch.Tensor) -> list[int]:
    """Which frames these are, of float [C, F, H, W] or uint8 [F, H, W, C]."""
    frames = clip[0] * 255 if clip.dtype == torch.float32 else torch.as_tensor(clip)[..., 0].float()
    return [round((float(frame[12:].mean()) - 2) / 10) for frame in frames]


class Decoder:
    """torchcodec's VideoDecoder, as its documentation has it, where it cannot be loaded."""

    asked: list[int] = []  # noqa: RUF012

    def __init__(self, source, *, dimension_order="NCHW"):
        assert isinstance(source, (str, bytes))
        assert dimension_order == "NHWC"
        try:
            with av.open(io.BytesIO(source) if isinstance(source, bytes) else source) as container:
                self.frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        except ValueError as error:
            raise RuntimeError(error) from error
        self.metadata = SimpleNamespace(width=48, height=32)

    def __len__(self):
        return len(self.frames)

    def get_frames_at(self, indices):
        Decoder.asked += indices
        return SimpleNamespace(data=torch.from_numpy(np.stack([self.frames[i] for i in indices])))


@pytest.fixture(params=["pyav", "torchcodec"])
def decoding(request, monkeypatch) -> str:
    video_decoders.decoder.cache_clear()
    if request.param == "torchcodec":
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, RuntimeError):
            stand_in(monkeypatch)
    return request.param


def stand_in(monkeypatch) -> None:
    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    package.decoders, decoders.VideoDecoder = decoders, Decoder
    package.__version__, package.__path__ = "0", []
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)


def settings(kind: str, path: Path, *words: str) -> config.Config:
    given = [f"data.kind={kind}", f"data.path={path}", "data.size=16", "data.frames=4",
             "data.stride=2", "training.batch=4", "loss.future=0", *words]  # fmt: skip
    return config.load("vjepa_physics", ["data.videos=2000", *given])


def test_clips_depend_on_seed_and_step_alone(decoding, tmp_path):
    """From files and from shards, with workers and without, on one rank or two."""
    contents = [encode(first) for first in range(5)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.mp4").write_bytes(content)
    write(tmp_path / "s" / "a.tar", {f"{n}.mp4": c for n, c in enumerate(contents[:2])})
    write(tmp_path / "s" / "b.tar", {f"{n}.MP4": c for n, c in enumerate(contents[2:])})
    words = [f"data.decoder={decoding}"]
    alone = sources.source(settings("videos", tmp_path, *words))
    whole = list(islice(alone.batches(0, batches.Share()), 3))
    for clip in torch.cat(whole):
        first, *rest = numbers(clip)
        assert rest == [first + 2, first + 4, first + 6]
    assert len({numbers(clip)[0] for clip in torch.cat(whole)}) > 3
    shards = sources.source(settings("webdataset", tmp_path / "s", *words, "data.workers=2"))
    parts = [islice(shards.batches(1, batches.Share(rank, 2)), 2) for rank in (0, 1)]
    for batch, halves in zip(whole[1:], zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(halves), batch)


def test_no_more_is_decoded_than_a_clip_needs(decoding, tmp_path, monkeypatch):
    shown: list[int] = []
    opened = video_decoders.PyAV._open

    @contextmanager
    def counting(self):
        with opened(self) as container:

            def decode(stream):
                for number, frame in enumerate(container.decode(stream)):
                    shown.append(number)
                    yield frame

            yield SimpleNamespace(decode=decode, demux=container.demux, streams=container.streams)

    monkeypatch.setattr(video_decoders.PyAV, "_open", counting)
    monkeypatch.setattr(Decoder, "asked", [])
    video = video_decoders.decoder(decoding)("v", encode(), 16)
    assert len(video) == FRAMES
    assert numbers(video[3:10:3]) == [3, 6, 9]
    if decoding == "pyav":
        assert shown == list(range(10))
    elif sys.modules["torchcodec.decoders"].VideoDecoder is Decoder:
        assert Decoder.asked == [3, 6, 9]


def test_a_telephones_video_stands_upright(tmp_path):
    """torchcodec turns it of itself; the corner is at the left above, then below."""
    for rotation, corner in ((0, (1, 0)), (90, (15, 1))):
        frame = video_decoders.PyAV("v", encode(rotation=rotation), 16)[0:1][0, :, :, 0]
        assert frame[corner] > 128, rotation
        assert (frame > 128).mean() < 0.2


def test_a_file_that_promises_more_frames_than_it_shows(tmp_path, monkeypatch):
    """A clip then begins by the frames that are there, not by those that were promised."""
    monkeypatch.setattr(video_decoders.PyAV, "_packets", 90)
    clips = batches.Clips([video_decoders.PyAV("v", encode(), 16)], 3, 4)
    assert [numbers(clips[0, where]) for where in (0.0, 0.5, 0.999)] == [
        [0, 4, 8], [8, 12, 16], [15, 19, 23],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encode(frames=6), "{} has 6 frames, a clip takes 7"),
        (b"not a video", "{}: cannot be decoded"),
    ],
)
@pytest.mark.parametrize("kind", ["videos", "webdataset"])
def test_what_is_wrong_in_a_video_is_named(kind, content, message, decoding, tmp_path):
    if kind == "videos":
        (tmp_path / "bad.mp4").write_bytes(content)
        name = f"video '{tmp_path}/bad.mp4'"
    else:
        write(tmp_path / "a.tar", {"bad.mp4": content})
        name = f"video of shard '{tmp_path}/a.tar', sample 'bad'"
    made = settings(kind, tmp_path, f"data.decoder={decoding}")
    clips = batches.Clips(videos.of(made), 4, 2)
    with pytest.raises(ValueError, match=re.escape(message.format(name))):
        clips[0, 0.5]


def test_a_truncated_video_is_named_wherever_its_clip_begins():
    """Before any of its frames is decoded."""
    clips = batches.Clips([video_decoders.PyAV("v", encode()[:-150], 16)], 3, 1)
    with pytest.raises(ValueError, match=r"video v: cannot be decoded \(it is truncated"):
        clips[0, 0.0]


def npz(**arrays) -> bytes:
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    return packed.getvalue()


def test_arrays_in_shards(tmp_path):
    frames = np.arange(9, dtype=np.uint8).reshape(9, 1, 1, 1) * np.full(
        (1, 32, 48, 3), 10, np.uint8
    )
    write(tmp_path / "a.tar", {"0.npz": npz(video=frames), "0.json": b"{}"})
    source = videos.of(settings("webdataset", tmp_path))
    assert numbers(batches.Clips(source, 3, 2)[0, 0.99]) == [4, 6, 8]
    assert source[0][:].shape == (9, 16, 16, 3)
    with pytest.raises(ValueError, match="decoder: got 'pyav', but the shards hold arrays alone"):
        videos.of(settings("webdataset", tmp_path, "data.decoder=pyav"))
    with pytest.raises(ValueError, match=r"sample '0' has 9 frames, a clip takes 10"):
        batches.Clips(source, 10, 1)[0, 0.0]
    for bad in (npz(video=frames[None]), npz(video=frames / 2), npz(other=frames), b"x"):
        write(tmp_path / "a.tar", {"0.npz": bad})
        with pytest.raises(ValueError, match=r"a\.tar', sample '0'"):
            videos.of(settings("webdataset", tmp_path))[0]


def test_the_decoder_is_told_and_never_changed_in_silence(monkeypatch, capsys):
    def told(name: str) -> str:
        video_decoders.decoder.cache_clear()
        for _ in range(2):
            video_decoders.decoder(name)
        return capsys.readouterr().err

    stand_in(monkeypatch)
    assert told("auto") == told("torchcodec") == "videos are decoded by TorchCodec 0\n"
    assert told("pyav") == "videos are decoded by PyAV\n"
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    assert told("auto") == "videos are decoded by PyAV; torchcodec is not installed\n"
    with pytest.raises(ImportError, match="got 'torchcodec', which is not installed"):
        told("torchcodec")
    monkeypatch.delitem(sys.modules, "torchcodec.decoders")
    monkeypatch.setattr(sys, "meta_path", [WithoutFFmpeg(), *sys.meta_path])
    assert told("auto").startswith("videos are decoded by PyAV; torchcodec cannot be loaded: no FF")
    with pytest.raises(ImportError, match="which cannot be loaded: no FFmpeg"):
        told("torchcodec")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="video files need PyAV or torchcodec"):
        told("pyav")


class WithoutFFmpeg:
    """Imports torchcodec as a machine without FFmpeg's libraries does."""

    def find_spec(self, name, *_):
        if name == "torchcodec.decoders":
            raise RuntimeError("no FFmpeg\nand a page more")
