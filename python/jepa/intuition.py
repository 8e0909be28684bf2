"""The physics test: how a model's surprise tells impossible videos from possible ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa import surprise
from jepa.physics import PROPERTIES, quadruplet

SCORES = ("mean", "maximum")


@dataclass(frozen=True)
class Score:
    """Of one property: the share of pairs told apart, and the AUROC over single videos.

    In each quadruplet every impossible video is paired with the possible one that shares its past.
    """

    property: str
    pairs: int
    accuracy: float
    auroc: float


def quadruplets(property: str, count: int, first_seed: int = 0) -> Tensor:
    """uint8 [count, 4, F, H, W, 3]: two possible, two impossible; seeds no training sees."""
    found = [quadruplet(property, first_seed + i).videos for i in range(count)]
    return torch.from_numpy(np.stack(found))


def scores(
    surprise_of: Callable[[Tensor], dict[str, list[float]]],
    count: int,
    properties: tuple[str, ...] = tuple(PROPERTIES),
) -> Iterator[dict[str, Score]]:
    """Each property's scores by how a video's curve becomes one number.

    surprise_of: uint8 [N, F, H, W, 3] -> SCORES' names -> N numbers.
    """
    for name in properties:
        videos = quadruplets(name, count)
        found = surprise_of(videos.flatten(0, 1))
        result = {}
        for kind, values in found.items():
            grid = torch.tensor(values).view(count, 4)
            possible, impossible = grid[:, :2].flatten().tolist(), grid[:, 2:].flatten().tolist()
            result[kind] = Score(
                name,
                2 * count,
                surprise.relative_accuracy(possible, impossible),
                surprise.auroc(possible, impossible),
            )
        yield result


def of_method(method: Any, stride: int = 2) -> Callable[[Tensor], dict[str, list[float]]]:
    """A trained V-JEPA's surprise."""

    def found(videos: Tensor) -> dict[str, list[float]]:
        curves = surprise.curves(method, videos, stride=stride)
        return {"mean": [c.mean for c in curves], "maximum": [c.maximum for c in curves]}

    return found
