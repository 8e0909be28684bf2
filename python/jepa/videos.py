"""Videos to take clips from, uint8 [F, H, W, 3] each: simulated, in shards, or a folder's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa.config import Config

SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
PHYSICS = Path("runs/physics")


def of(settings: Config) -> Sequence[Any]:
    """The training videos of a run."""
    data = settings.data
    if data.kind == "physics":
        return simulated(data.path or PHYSICS, data.videos, settings.seed, data.workers)
    assert data.path is not None
    if data.kind == "shards":
        from jepa.physics.datasets import Shards

        return Shards(data.path)
    return Folder(data.path, data.size)


def simulated(folder: Path, videos: int, seed: int, workers: int) -> Sequence[Any]:
    """The first `videos` of the seed's physics videos; those not in the folder are made first."""
    from tqdm import tqdm

    from jepa.physics import shards
    from jepa.physics.datasets import Shards

    with tqdm(total=videos, desc="physics videos", unit="video", ncols=100) as bar:
        shards.write(folder, videos, shards.Settings(seed), workers, bar.update)
    return torch.utils.data.Subset(Shards(folder), range(videos))


class Folder:
    """Every video file below a folder, decoded whole when it is asked for."""

    def __init__(self, folder: str | Path, size: int) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"data.path: got {str(root)!r}, takes a folder of videos")
        self.files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
        self.size = size
        if not self.files:
            raise ValueError(f"data.path: {root} holds no video ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return decode(self.files[index], self.size)


def decode(path: str | Path, size: int) -> Tensor:
    """uint8 [F, size, size, 3]: the central square of every frame."""
    try:
        import av
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            f"video files need PyAV and Pillow: pip install av pillow ({error})"
        ) from error
    frames = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                image: Image.Image = frame.to_image()
                frames.append(np.asarray(ImageOps.fit(image.convert("RGB"), (size, size))))
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"video {str(path)!r}: cannot be decoded ({error})") from error
    if not frames:
        raise ValueError(f"video {str(path)!r}: holds no frame")
    return torch.from_numpy(np.stack(frames))
