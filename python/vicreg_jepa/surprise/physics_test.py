"""The physics test: does a model's surprise separate impossible videos from possible ones?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicreg_jepa.physics import quadruplet
from vicreg_jepa.surprise import curves

# uint8 [N, F, H, W, 3] -> {the reduction of a curve ("mean", "maximum"): N numbers}
SurpriseOf = Callable[[Tensor], dict[str, list[float]]]


@dataclass(frozen=True)
class Score:
    """The results for one property: the share of quadruplets told apart, and the AUROC over
    single videos.

    A quadruplet is told apart if its two impossible videos together surprise more than its two
    possible ones, which is IntPhys' relative score. Its videos are made of the same frames, so an
    effect of single frames cancels.
    """

    property: str
    quadruplets: int
    accuracy: float
    auroc: float


def quadruplets(property: str, count: int, first_seed: int = 0) -> Tensor:
    """uint8 [count, 4, F, H, W, 3]: two possible and two impossible videos, of seeds that no
    training uses.
    """
    videos = [quadruplet(property, first_seed + i).videos for i in range(count)]
    return torch.from_numpy(np.stack(videos))


def scores(surprise_of: SurpriseOf, videos: Tensor, property: str) -> dict[str, Score]:
    """Score quadruplets [count, 4, F, H, W, 3]: {reduction of a curve: score}."""
    count, result = len(videos), {}
    for kind, values in surprise_of(videos.flatten(0, 1)).items():
        grid = torch.tensor(values, dtype=torch.float64).view(count, 2, 2)
        possible, impossible = grid.sum(dim=2).T.tolist()
        result[kind] = Score(
            property,
            count,
            curves.relative_accuracy(possible, impossible),
            curves.auroc(*grid.transpose(0, 1).flatten(1).tolist()),
        )
    return result


def of_method(method: Any, stride: int) -> SurpriseOf:
    """The surprise of a trained model; stride: the distance in the video of the frames that it
    takes.
    """

    def surprise_of(videos: Tensor) -> dict[str, list[float]]:
        each = curves.curves(method, videos, stride=stride)
        return {"mean": [c.mean for c in each], "maximum": [c.maximum for c in each]}

    return surprise_of
