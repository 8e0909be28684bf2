"""Opens the images, clips or trajectories that the settings of a run name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vicreg_jepa.config import Config, Data
from vicreg_jepa.data import image_files, image_sets, trajectories, videos
from vicreg_jepa.data.batches import Clips, ClipSource, ImageSource
from vicreg_jepa.methods import METHODS


def images(settings: Config) -> tuple[Any, Any]:
    """(training, held out) of a run on images."""
    data, seed = settings.data, settings.seed
    if data.kind == "digits":
        digits = image_sets.digits()
        return image_sets.split(
            digits if data.size == 8 else image_sets.resized(digits, data.size), seed
        )
    assert data.path is not None
    if data.kind == "torchvision":
        assert data.name is not None
        return image_files.torchvision(data.name, data.path, data.size, data.download)
    whole = _stored(data, data.path)
    if data.test is not None:
        held_out = _stored(data, data.test)
        if held_out.classes != whole.classes:
            raise ValueError(
                f"data.test: {data.test} has the classes {held_out.classes}, takes data.path's "
                f"{whole.classes}"
            )
        return whole, held_out
    return image_sets.split(whole, seed) if whole.classes else image_sets.split_blind(whole, seed)


def _stored(data: Data, path: Path) -> image_files.Stored:
    folder = data.kind == "images"
    source = image_files.ImageFolder(path) if folder else image_files.ImageShards(path, data.limits)
    return image_files.stored(path.name, source, data.size, data.limits)


def source(settings: Config) -> Any:
    batch, seed, workers = settings.training.batch, settings.seed, settings.data.workers
    if settings.is_of_trajectories:
        return trajectories.source(settings)
    if not settings.is_video:
        # Token methods draw masks without the images, so a rank reads only its own images.
        whole = METHODS[settings.method].learns == "views"
        return ImageSource(images(settings)[0], batch, seed, workers, whole)
    clips = Clips(videos.of(settings), settings.data.frames, settings.data.stride)
    return ClipSource(clips, batch, seed, workers)
