"""Which rows go when the space ends: those that neither surprised nor were used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.memory.rows import Ids

YOUNG = 4  # the youngest quarter of the space stays
ROOM = 16  # a sixteenth of the space is made free at once


def worth(surprise: NDArray[np.float64], uses: Ids) -> NDArray[np.float64]:
    """float64 [N] in [0, 2): the share of the N rows that surprised less, plus the share that was
    used less. Shares have no unit, so neither the scale of the surprise matters, which falls while
    a model learns, nor that of the uses.
    """
    count = max(1, len(uses))
    less_surprising = np.searchsorted(np.sort(surprise), surprise)
    less_used = np.searchsorted(np.sort(uses), uses)
    return (less_surprising + less_used) / count


def evicted(ids: Ids, surprise: NDArray[np.float64], uses: Ids, most: int) -> Ids:
    """The ids that go, so that at most `most` rows stay: none while there are no more than that.
    Else as many go as leave a sixteenth of `most` free, those of the least worth, and of equal
    worth the oldest; never one of the youngest quarter of `most`.

    ids: int64 [N], ascending; surprise: float64 [N]; uses: int64 [N].
    """
    if len(ids) <= most:
        return ids[:0]
    old = len(ids) - most // YOUNG
    going = min(old, len(ids) - most + most // ROOM)
    value = worth(surprise[:old], uses[:old])
    return np.sort(ids[:old][np.lexsort((ids[:old], value))[:going]])
