"""Video files by torchcodec or PyAV, decoded only as far as the requested frames.

Both return the same frames; their colours may differ by rounding.
"""

from __future__ import annotations

import io
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.data.video_containers import check_whole
from vicreg_jepa.files.pictures import DEFAULT, Limits, Refused, square


class Recording(ABC):
    """A video's frames by slices, uint8 [F, size, size, 3]: the central square of each.

    source: a file, or a file's content. Raises ValueError that begins with `name` if it cannot be
    decoded or its frames are larger than `limits` allow.
    """

    def __init__(
        self, name: str, source: Path | bytes, size: int, limits: Limits = DEFAULT
    ) -> None:
        self.name, self.source, self.size, self.limits = f"video {name}", source, size, limits

    def __len__(self) -> int:
        with self._named():
            length = self._length()
        if length == 0:
            raise ValueError(f"{self.name}: holds no frame")
        return length

    def __getitem__(self, places: slice) -> NDArray[np.uint8]:
        numbers = range(*places.indices(len(self)))
        with self._named():
            frames = self._frames(numbers)
        return np.array(frames, np.uint8).reshape(-1, self.size, self.size, 3)

    @property
    def _whence(self) -> bytes | str:
        """The absolute path, because FFmpeg would read a name like a:b.mp4 as one of its
        protocols.
        """
        return self.source if isinstance(self.source, bytes) else os.path.abspath(self.source)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except Refused as error:
            raise ValueError(f"{self.name}: {error}") from error
        except Exception as error:  # both decoders raise many kinds
            raise ValueError(f"{self.name}: cannot be decoded ({error})") from error

    @abstractmethod
    def _length(self) -> int:
        """The number of frames."""

    @abstractmethod
    def _frames(self, numbers: range) -> list[NDArray[np.uint8]]:
        """Each [size, size, 3], in the order of `numbers`."""


class PyAV(Recording):
    """Decodes from the first frame to the last requested one.

    Raises an error for a frame that FFmpeg could not decode completely, and for the frames that
    depend on it.
    """

    def _open(self) -> Any:
        import av

        return av.open(
            io.BytesIO(self._whence) if isinstance(self._whence, bytes) else self._whence
        )

    def _film(self, container: Any) -> Any:
        """The video stream that FFmpeg ranks best, as in torchcodec; never a cover image."""
        stream = container.streams.best("video")
        if stream is None or stream.disposition & type(stream.disposition).attached_pic:
            raise ValueError("it has no video stream, or only a cover image")
        self.limits.check(stream.codec_context.width, stream.codec_context.height)
        return stream

    @cached_property
    def _packets(self) -> int:
        """The number of frames by the file's packets, which are counted, not decoded."""
        count = 0
        with self._open() as container:
            for packet in container.demux(self._film(container)):
                if packet.is_corrupt:
                    raise ValueError("it is truncated")
                count += packet.size > 0 and not packet.is_discard
        return count

    shown: int | None = None  # the number of frames, if fewer than the packets

    def _length(self) -> int:
        check_whole(self._whence)
        return self._packets if self.shown is None else self.shown

    def _frames(self, numbers: range) -> list[NDArray[np.uint8]]:
        frames, number, damaged = [], -1, None
        with self._open() as container:
            for number, frame in enumerate(container.decode(self._film(container))):
                if frame.is_corrupt:
                    damaged = number
                elif frame.key_frame:  # builds on no other
                    damaged = None
                if number in numbers:
                    if damaged is not None:
                        raise ValueError(f"frame {damaged} is damaged")
                    self.limits.check(frame.width, frame.height)
                    # as torchcodec does of itself: a telephone's videos lie on their side
                    upright = frame.to_image().rotate(frame.rotation, expand=True)
                    frames.append(square(upright, self.size))
                if number == numbers[-1]:
                    return frames
        self.shown = number + 1
        return frames


class TorchCodec(Recording):
    """Decodes from the key frame before each requested frame."""

    @cached_property
    def _decoder(self) -> Any:
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(self._whence, dimension_order="NHWC")
        self.limits.check(decoder.metadata.width, decoder.metadata.height)
        return decoder

    def _length(self) -> int:
        check_whole(self._whence)
        return len(self._decoder)

    def _frames(self, numbers: range) -> list[NDArray[np.uint8]]:
        from PIL import Image

        frames = self._decoder.get_frames_at(indices=list(numbers)).data.numpy()
        return [square(Image.fromarray(frame), self.size) for frame in frames]


@cache
def decoder(name: str) -> type[Recording]:
    """pyav, torchcodec, or auto: torchcodec if it can be loaded, else PyAV. Prints the choice
    once.
    """
    kind: type[Recording] = PyAV
    why = ""
    if name != "pyav":
        try:
            import torchcodec.decoders

            kind, why = TorchCodec, f" {torchcodec.__version__}"
        except (ImportError, OSError, RuntimeError) as error:
            missing = "is not installed"
            if not isinstance(error, ModuleNotFoundError):  # no FFmpeg, or made for another torch
                missing = f"cannot be loaded: {str(error).splitlines()[0]}"
            if name == "torchcodec":
                raise ImportError(
                    f"data.decoder: got 'torchcodec', which {missing} (pip install torchcodec, "
                    "and FFmpeg's shared libraries)"
                ) from error
            why = f"; torchcodec {missing}"
    if kind is PyAV:
        try:
            import av  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"video files need PyAV or torchcodec: pip install av ({error}{why})"
            ) from error
    if os.environ.get("RANK", "0") == "0":
        print(f"videos are decoded by {kind.__name__}{why}", file=sys.stderr)
    return kind
