"""Two possible and two impossible videos that are made of the same frames.

    videos[0]  first past,  first future    possible
    videos[1]  second past, second future   possible
    videos[2]  first past,  second future   impossible
    videos[3]  second past, first future    impossible

At every frame the impossible two show the same pictures as the possible two, so no score that is a
sum over single frames can tell them apart (Riochet et al., arXiv:1803.07616). If the exchange is
hidden, this holds for every sequence of frames that does not span the hidden frames. The fairest
comparison is between videos with the same future, 2 with 1 and 3 with 0, from the first difference
on: from there they show the same frames, so any aggregate of surprise may be taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.physics.pair import Pair
from vicreg_jepa.physics.properties import PROPERTIES
from vicreg_jepa.physics.render import frames
from vicreg_jepa.physics.scene import FRAMES, SIZE, Clip, simulate
from vicreg_jepa.physics.stage import chance
from vicreg_jepa.physics.unpredictable import of_quadruplet

TRIES = 400
SEEN = 14  # pixels that must differ by more than LEVELS for a person to see it
LEVELS = 40


@dataclass(frozen=True)
class Quadruplet:
    """videos: uint8 [4, T, 64, 64, 3]; possible: bool [4] (all true for the control).

    first_difference: the first frame at which an exchanged video differs from the one whose past it
    has: 2 from 0 and 3 from 1. behind_occluder: the exchange is hidden by a panel. record:
    property, seed, the frame of the cut, the records of the possible videos, and `same`: the number
    of consecutive frames around the cut at which both possible videos show the same picture.
    """

    videos: NDArray[np.uint8]
    possible: NDArray[np.bool_]
    first_difference: int
    behind_occluder: bool
    record: dict[str, Any]


def quadruplet(
    property: str, seed: int, behind_occluder: bool | None = None, noise: float = 0.0
) -> Quadruplet:
    """The quadruplet of the seed. behind_occluder: None draws it with probability one half. noise:
    the strength of what cannot be predicted, from 0 to 1, which is the same in all four videos
    (unpredictable.py).

    It shares no random stream with `possible`, so every seed is held out from training. Raises
    ValueError if the property is unknown, the seed is negative or the noise is another number.
    """
    if property not in PROPERTIES:
        raise ValueError(f"property: got {property!r}, takes one of {', '.join(PROPERTIES)}")
    if seed < 0:
        raise ValueError(f"seed: got {seed}, takes an integer from 0")
    number = 1 + list(PROPERTIES).index(property)
    disturbance = of_quadruplet(number, seed, noise)
    rng = np.random.default_rng([number, seed])
    drawn = chance(rng, 0.5)
    hidden = drawn if behind_occluder is None else behind_occluder
    for _ in range(TRIES):
        pair = PROPERTIES[property](rng, hidden)
        if chance(rng, 0.5):
            pair = mirrored(pair)
        exchange = _exchange(pair, rng)
        if exchange is not None:
            videos, cut, same, clips = exchange
            videos = disturbance(videos, range(FRAMES))
            possible = np.array([True, True, property == "control", property == "control"])
            record = {"property": property, "seed": seed, "cut": cut, "same": len(same)}
            record |= {"possible": [clip.record() for clip in clips]}
            return Quadruplet(videos, possible, max(same.stop, cut), hidden, record)
    raise RuntimeError(f"no {property} quadruplet of seed {seed} in {TRIES} tries")


def mirrored(pair: Pair) -> Pair:
    first, second = pair.first.mirrored(), pair.second.mirrored()
    return Pair(first, second, pair.unseen, pair.cut, pair.apart)


def _exchange(
    pair: Pair, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], int, range, tuple[Clip, Clip]] | None:
    """The videos, the cut, the frames around it at which both possible videos show the same
    picture, and both clips; None if a person could not see the exchange.
    """
    clips = simulate(pair.first), simulate(pair.second)
    window = range(pair.cut[0], pair.cut[1] + 1)
    cuts = [cut for cut in window if _apart(pair, clips, cut) and _in_view(clips, cut)]
    if not cuts:
        return None
    first, second = (frames(clip) for clip in clips)
    far = np.maximum(first, second) - np.minimum(first, second)  # [T, 64, 64, 3]
    differ = np.any(far, axis=(1, 2, 3))
    if pair.unseen:
        cuts = [cut for cut in cuts if not differ[cut - 1 : cut + 1].any()]
    else:
        cuts = [cut for cut in cuts if not _covered(clips, cut)]
    if not cuts:
        return None
    cut = cuts[int(rng.integers(len(cuts)))]
    seen = (far > LEVELS).any(axis=3).sum(axis=(1, 2)) >= SEEN
    if seen[:cut].sum() < 3 or seen[cut:].sum() < 3:
        return None
    before, after = np.flatnonzero(differ[:cut])[-1], cut + np.flatnonzero(differ[cut:])[0]
    swapped = (np.concatenate(parts) for parts in _parts(first, second, cut))
    return np.stack([first, second, *swapped]), cut, range(int(before) + 1, int(after)), clips


def _parts(first: NDArray, second: NDArray, cut: int) -> tuple[tuple[NDArray, NDArray], ...]:
    return (first[:cut], second[cut:]), (second[:cut], first[cut:])


def _apart(pair: Pair, clips: tuple[Clip, Clip], cut: int) -> bool:
    positions = [clip.position[cut] for clip in clips]
    if len(positions[0]) != len(positions[1]):
        return True
    low, high = pair.apart
    return low <= float(np.linalg.norm(positions[0][-1] - positions[1][-1])) <= high


def _in_view(clips: tuple[Clip, Clip], cut: int) -> bool:
    """Whether the edge of the picture cuts no thing around the cut."""
    around = slice(max(cut - 2, 0), cut + 3)
    for clip in clips:
        left, right, top, bottom = np.moveaxis(clip.bounds[around], 2, 0)
        outside = (right < 0) | (left > SIZE) | (bottom < 0) | (top > SIZE)
        if not (clip.inside()[around] | outside).all():
            return False
    return True


def _covered(clips: tuple[Clip, Clip], cut: int) -> bool:
    return any(bool(clip.covered()[cut - 1 : cut + 1, -1:].any()) for clip in clips)
