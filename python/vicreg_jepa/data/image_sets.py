"""Labelled images as one tensor, such as scikit-learn's digits; and the split of any labelled
set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from vicreg_jepa.data import image_files

Set = TypeVar("Set", "Images", image_files.Stored)


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

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def __getitem__(self, numbers: Sequence[int]) -> Tensor:
        """float32 [B, C, H, W]."""
        return self.images[list(numbers)]

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


def split(data: Set, seed: int, test_fraction: float = 0.2) -> tuple[Set, Set]:
    """A (training, test) pair with the same share of every class, chosen by `seed`."""
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


def split_blind(data: Set, seed: int, test_fraction: float = 0.2) -> tuple[Set, Set]:
    """The same for a set without labels: a random split by `seed`."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    held_out = max(1, round(test_fraction * len(data)))
    return data.subset(order[held_out:]), data.subset(order[:held_out])


def resized(data: Images, size: int) -> Images:
    """Every image enlarged or reduced to size x size, bilinear with antialiasing."""
    images = torch.nn.functional.interpolate(
        data.images, (size, size), mode="bilinear", antialias=True
    )
    return replace(data, images=images.clamp(0.0, 1.0))
