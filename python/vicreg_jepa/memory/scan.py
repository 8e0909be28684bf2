"""Exact search among vectors in memory: a product of matrices finds the candidates, and float64
decides among them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.memory.rows import Ids

EVER = 2**63 - 1
COLUMNS = ("_ids", "_times", "_vectors", "_squares")


class Vectors:
    """Vectors of `size` dimensions and one dtype, with ids that ascend and the times of each."""

    def __init__(self, size: int, kind: np.dtype[Any]) -> None:
        self.count = 0
        self._ids = np.empty(0, np.int64)
        self._times = np.empty(0, np.int64)
        self._vectors = np.empty((0, size), kind)
        self._squares = np.empty(0, kind)  # of their norms

    @property
    def ids(self) -> Ids:
        return self._ids[: self.count]

    def add(self, ids: Ids, times: Ids, vectors: NDArray[Any]) -> None:
        """Add N vectors [N, size], whose ids ascend. Those up to the last id here are left out."""
        if self.count:
            fresh = ids > self._ids[self.count - 1]
            ids, times, vectors = ids[fresh], times[fresh], vectors[fresh]
        end = self.count + len(ids)
        if end > len(self._ids):
            self._grow(max(end, 2 * len(self._ids)))
        place = slice(self.count, end)
        self._ids[place], self._times[place], self._vectors[place] = ids, times, vectors
        with np.errstate(over="ignore"):
            self._squares[place] = np.square(vectors, dtype=np.float64).sum(axis=1)
        self.count = end

    def _grow(self, room: int) -> None:
        olds = {name: getattr(self, name) for name in COLUMNS}
        news = {name: np.empty((room, *old.shape[1:]), old.dtype) for name, old in olds.items()}
        for name, new in news.items():  # when all are there: memory may end
            new[: self.count] = olds[name][: self.count]
            setattr(self, name, new)

    def remove(self, ids: Ids) -> None:
        """Remove those of `ids` that are here."""
        kept = np.flatnonzero(~np.isin(self.ids, ids))
        if len(kept) == self.count:
            return
        for name in COLUMNS:
            getattr(self, name)[: len(kept)] = getattr(self, name)[kept]
        self.count = len(kept)

    def search(
        self, queries: NDArray[Any], k: int, first: int = 0, last: int = EVER
    ) -> list[tuple[Ids, NDArray[np.float64]]]:
        """For each query of [Q, size] the ids of the k nearest vectors, or of all if there are
        fewer, and their squared distances, float64; of equal distances the lowest ids, so that the
        result is one function of the vectors, whatever their places here. first, last: only those
        whose times are from first to last.
        """
        here = slice(0, self.count)
        among = np.ones(self.count, bool)
        if first > 0 or last < EVER:
            among = (self._times[here] >= first) & (self._times[here] <= last)
        vectors, squares = self._vectors[here], self._squares[here]
        wide = queries.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            # |x|^2 - 2 x.q orders the vectors as |x - q|^2 does.
            about = squares - 2 * (queries.astype(vectors.dtype) @ vectors.T)
            slack = self._slack(squares, np.square(wide).sum(axis=1))
        return [
            self._nearest(wide[row], k, among, about[row], slack[row]) for row in range(len(wide))
        ]

    def _slack(self, squares: NDArray[Any], of_queries: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far two of the values that `search` compares may be out of order by rounding. A dot
        product of n terms is off by at most n u / (1 - n u) times the product of the norms (Higham,
        Accuracy and Stability of Numerical Algorithms, 3.1), which is at most half the sum of their
        squares; u is half of eps. This is twice that bound, and the least normal number for each
        term, which may be lost to underflow.
        """
        size, kind = self._vectors.shape[1], np.finfo(self._vectors.dtype)
        most = float(squares.max(initial=0.0))
        slack: NDArray[np.float64] = 2 * (size + 4) * float(kind.eps) * (most + of_queries)
        return slack + 4 * size * float(kind.tiny)

    def _nearest(
        self,
        query: NDArray[np.float64],
        k: int,
        among: NDArray[np.bool_],
        about: NDArray[Any],
        slack: float,
    ) -> tuple[Ids, NDArray[np.float64]]:
        places = np.flatnonzero(among)
        about = about[places] if len(places) < len(about) else about
        if k < len(places):
            with np.errstate(invalid="ignore", over="ignore"):
                limit = float(np.partition(about, k - 1)[k - 1]) + slack
            # Where a value overflowed, the limit or the value is NaN, and float64 decides.
            places = places[~(about > limit)]
        with np.errstate(over="ignore"):  # infinitely far
            exact = np.square(self._vectors[places].astype(np.float64) - query).sum(axis=1)
        order = np.lexsort((self._ids[places], exact))[:k]
        return self._ids[places[order]], exact[order]
