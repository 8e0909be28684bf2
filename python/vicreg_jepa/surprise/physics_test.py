"""The physics test: does a model's surprise separate impossible videos from possible ones?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicreg_jepa.evaluation.auroc import auroc
from vicreg_jepa.physics import quadruplet
from vicreg_jepa.surprise import curves
from vicreg_jepa.surprise.expectation import Expectation

# Where the exchange takes place -> `behind_occluder` of the quadruplets.
PLACES = {"in view": False, "behind a panel": True}
# The points of relative accuracy by which a model must be above the best control at a property: a
# control that does as well shows that the property can be told without having learned it.
MARGIN = 25
# Relative: the same windows in another batch, and summed in another order, differ by up to this.
TIE = 1e-5
# uint8 [N, F, H, W, 3] -> {the reduction of a curve ("mean", "maximum" and, of models, "peak"): N
# numbers}
SurpriseOf = Callable[[Tensor], dict[str, list[float]]]


@dataclass(frozen=True)
class Score:
    """The results for one property: the share of quadruplets told apart, and the AUROC over
    single videos.

    A quadruplet is told apart if its two impossible videos together surprise more than its two
    possible ones, which is IntPhys' relative score. Its videos are made of the same frames, so an
    effect of single frames cancels. told: of each quadruplet, 1, or 0.5 for a tie (equal to TIE).
    delays: for how many frames up to the first difference both its possible videos show the same
    picture. values: of its four videos.
    """

    property: str
    quadruplets: int
    accuracy: float
    auroc: float
    told: tuple[float, ...]
    delays: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]


def quadruplets(
    property: str,
    count: int,
    first_seed: int = 0,
    behind_occluder: bool | None = None,
    noise: float = 0.0,
) -> Tensor:
    """uint8 [count, 4, F, H, W, 3]: two possible and two impossible videos, of seeds that no
    training uses. The other arguments are those of `physics.quadruplet`.
    """
    made = (quadruplet(property, first_seed + i, behind_occluder, noise) for i in range(count))
    return torch.from_numpy(np.stack([four.videos for four in made]))


def delay(four: Tensor) -> int:
    """For how many frames before the first difference the possible videos of uint8 [4, F, H, W, 3]
    show the same picture, as its record's `same` says: 0 for an exchange in view.
    """
    exchanged = (four[2] != four[0]).flatten(1).any(dim=1)
    alike = (four[1] == four[0]).flatten(1).all(dim=1).tolist()
    first = int(exchanged.int().argmax())
    count = 0
    while count < first and alike[first - 1 - count]:
        count += 1
    return count


def scores(surprise_of: SurpriseOf, videos: Tensor, property: str) -> dict[str, Score]:
    """Score quadruplets [count, 4, F, H, W, 3]: {reduction of a curve: score}."""
    count, result = len(videos), {}
    delays = tuple(delay(four) for four in videos)
    for kind, values in surprise_of(videos.flatten(0, 1)).items():
        grid = torch.tensor(values, dtype=torch.float64).view(count, 2, 2)
        possible, impossible = grid.sum(dim=2).unbind(dim=1)
        tie = torch.isclose(impossible, possible, rtol=TIE, atol=0)
        told = torch.where(tie, 0.5, (impossible > possible).double()).tolist()
        result[kind] = Score(
            property,
            count,
            sum(told) / count,
            auroc(*grid.transpose(0, 1).flatten(1).tolist()),
            tuple(told),
            delays,
            tuple(tuple(row) for row in grid.flatten(1).tolist()),
        )
    return result


def of_method(method: Any, stride: int, expected: Expectation | None = None) -> SurpriseOf:
    """The surprise of a trained model; stride: the distance in the video of the frames that it
    takes; expected: of its peak.
    """

    def surprise_of(videos: Tensor) -> dict[str, list[float]]:
        each = curves.curves(method, videos, stride=stride, expected=expected)
        return {
            "mean": [c.mean for c in each],
            "maximum": [c.maximum for c in each],
            "peak": [c.peak for c in each],
        }

    return surprise_of
