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
    """Of one property: the share of quadruplets told apart, and the AUROC over single videos.

    A quadruplet is told apart where its two impossible videos surprise more than its two possible
    ones together: IntPhys' relative score. Its videos are made of the same frames, so what a model
    makes of their content falls out.
    """

    property: str
    quadruplets: int
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
            grid = torch.tensor(values, dtype=torch.float64).view(count, 2, 2)
            possible, impossible = grid.sum(dim=2).T.tolist()
            result[kind] = Score(
                name,
                count,
                surprise.relative_accuracy(possible, impossible),
                surprise.auroc(*grid.transpose(0, 1).flatten(1).tolist()),
            )
        yield result


def of_method(method: Any, stride: int = 2) -> Callable[[Tensor], dict[str, list[float]]]:
    """A trained V-JEPA's surprise."""

    def found(videos: Tensor) -> dict[str, list[float]]:
        curves = surprise.curves(method, videos, stride=stride)
        return {"mean": [c.mean for c in curves], "maximum": [c.maximum for c in curves]}

    return found
