"""The interface of a search among the embeddings of a store, and the exact search behind it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.memory.rows import EMBEDDING, Ids, Rows
from vicreg_jepa.memory.scan import Vectors

Hits = list[tuple[Ids, NDArray[np.float64]]]


class Index(Protocol):
    """Finds rows by their embeddings. The store is what lasts: an index holds a copy of it, and the
    store brings it up to date before each search.
    """

    @property
    def shared(self) -> bool:
        """Whether other processes see what is added; only a writer takes such an index."""

    def ids(self) -> Ids:
        """The ids of all rows here, int64 [N] in any order."""

    def add(self, rows: Rows) -> None:
        """Add rows, whose ids ascend from call to call; those that are here are left."""

    def remove(self, ids: Ids) -> None:
        """Remove rows by their ids, those that are here."""

    def search(self, queries: NDArray[np.float32], k: int, world: str | None) -> Hits:
        """For each query of [Q, D] the ids of the k nearest rows of a world, or of all worlds, or
        of fewer where there are fewer, nearest first; and their squared Euclidean distances.
        """


class Scan:
    """The exact search: every embedding of the world is compared with the query. Its answers depend
    on the rows alone, so they are the same bits after a restart and in every process.
    """

    shared = False

    def __init__(self) -> None:
        self.worlds: dict[str, Vectors] = {}

    def ids(self) -> Ids:
        return np.concatenate([np.empty(0, np.int64), *(its.ids for its in self.worlds.values())])

    def add(self, rows: Rows) -> None:
        for world, its in by_world(rows):
            if world not in self.worlds:
                self.worlds[world] = Vectors(its.embedding.shape[1], np.dtype(EMBEDDING.type))
            self.worlds[world].add(its.id, its.time, its.embedding)

    def remove(self, ids: Ids) -> None:
        for vectors in self.worlds.values():
            vectors.remove(ids)
        self.worlds = {name: its for name, its in self.worlds.items() if its.count}

    def search(self, queries: NDArray[np.float32], k: int, world: str | None) -> Hits:
        asked = self.worlds if world is None else {world} & self.worlds.keys()
        return nearest([self.worlds[name].search(queries, k) for name in asked], len(queries), k)


def by_world(rows: Rows) -> list[tuple[str, Rows]]:
    """The rows of each world."""
    return [(world, rows.take(rows.world == world)) for world in dict.fromkeys(rows.world)]


def nearest(parts: list[Hits], queries: int, k: int) -> Hits:
    """The k nearest of what several searches with the same queries found."""
    found: Hits = []
    for number in range(queries):
        ids = np.concatenate([np.empty(0, np.int64), *(part[number][0] for part in parts)])
        squared = np.concatenate([np.empty(0), *(part[number][1] for part in parts)])
        order = np.lexsort((ids, squared))[:k]
        found.append((ids[order], squared[order]))
    return found
