"""Labelled images as one tensor: scikit-learn's digits, or a folder of the user's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Images:
    """A labelled set, whole in memory.

    images: float32 [N, C, H, W] in [0, 1]; labels: int64 [N], an index into `classes`.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> Images:
        return replace(self, images=self.images[index], labels=self.labels[index])


def digits() -> Images:
    """The 1797 handwritten digits of 8 x 8 pixels that ship with scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits need scikit-learn: pip install scikit-learn") from error
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(source.target, dtype=torch.int64)
    return Images("digits", images, labels, tuple(str(name) for name in source.target_names))


def image_folder(path: str | Path, size: int = 32) -> Images:
    """The images of `path`/<class>/*, cut to their central square and resized to `size`, as RGB.

    All of them are held in memory: 4 * 3 * size^2 bytes an image.

    Raises ValueError where the folder is not one of at least two class folders with images.
    """
    try:
        import numpy as np
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(
            f"an image folder needs Pillow and numpy: pip install pillow numpy ({error})"
        ) from error
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"images: got {str(root)!r}, takes a folder with one sub-folder a class")
    if size < 4:
        raise ValueError(f"size: got {size}, takes at least 4 pixels")
    files = {
        folder.name: sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }
    classes = tuple(name for name, found in files.items() if found)
    if len(classes) < 2:
        raise ValueError(
            f"images: got {str(root)!r} with {len(classes)} sub-folders that hold images, "
            f"takes at least 2 (one a class; files ending in {', '.join(SUFFIXES)})"
        )
    pixels, labels = [], []
    for label, name in enumerate(classes):
        for file in files[name]:
            try:
                with Image.open(file) as opened:
                    square = ImageOps.fit(opened.convert("RGB"), (size, size))
            except (UnidentifiedImageError, OSError) as error:
                raise ValueError(f"images: {file} is not an image Pillow reads: {error}") from error
            pixels.append(np.asarray(square, dtype=np.float32).transpose(2, 0, 1) / 255.0)
            labels.append(label)
    return Images(root.name, torch.from_numpy(np.stack(pixels)), torch.tensor(labels), classes)


def split(data: Images, seed: int, test_fraction: float = 0.2) -> tuple[Images, Images]:
    """A (training, test) pair with every class cut in the same proportion, fixed by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in range(len(data.classes)):
        members = (data.labels == label).nonzero().flatten()
        if len(members) < 2:
            raise ValueError(
                f"class {data.classes[label]!r}: got {len(members)} image, takes at least 2 "
                "(one to train on, one to test on)"
            )
        members = members[torch.randperm(len(members), generator=generator)]
        held_out = min(max(1, round(test_fraction * len(members))), len(members) - 1)
        test.append(members[:held_out])
        train.append(members[held_out:])
    return data.subset(torch.cat(train)), data.subset(torch.cat(test))


def resized(data: Images, size: int) -> Images:
    """Every image enlarged or reduced to size x size, bilinear with antialiasing."""
    images = torch.nn.functional.interpolate(
        data.images, (size, size), mode="bilinear", antialias=True
    )
    return replace(data, images=images.clamp(0.0, 1.0))
