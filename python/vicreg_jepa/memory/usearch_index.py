"""The graph of usearch as the index of a store: quick among many rows, and not exact."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.memory.index import Hits, by_world, nearest
from vicreg_jepa.memory.rows import Ids, Rows, whole


class UsearchIndex:
    """An index of usearch's HNSW graphs, one for each world, in memory: built anew when a store is
    opened. It may miss some of the nearest rows, and other ones after a restart.

    connectivity, expansion_add, expansion_search: as usearch has them; larger ones miss less and
    take longer. threads: that build the graphs; 0: one for each core.

    Raises ImportError that says what to install, ValueError that names the argument.
    """

    shared = False

    def __init__(
        self,
        connectivity: int = 16,
        expansion_add: int = 128,
        expansion_search: int = 64,
        threads: int = 0,
    ) -> None:
        whole("connectivity", connectivity, 2)
        whole("expansion_add", expansion_add, 1)
        whole("expansion_search", expansion_search, 1)
        whole("threads", threads, 0)
        self.threads = threads
        try:
            from usearch.index import Index
        except ImportError as error:
            raise ImportError(f"this index needs usearch: pip install usearch ({error})") from error
        self._make = Index
        self.settings = {
            "connectivity": connectivity,
            "expansion_add": expansion_add,
            "expansion_search": expansion_search,
        }
        self.worlds: dict[str, Any] = {}

    def ids(self) -> Ids:
        keys = [np.asarray(graph.keys).astype(np.int64) for graph in self.worlds.values()]
        return np.concatenate([np.empty(0, np.int64), *keys])

    def add(self, rows: Rows) -> None:
        for world, its in by_world(rows):
            if world not in self.worlds:
                size = its.embedding.shape[1]
                self.worlds[world] = self._make(
                    ndim=size, metric="l2sq", dtype="f32", **self.settings
                )
            graph = self.worlds[world]
            new = its.take(~np.asarray(graph.contains(its.id.astype(np.uint64))))
            if len(new):
                graph.add(new.id.astype(np.uint64), new.embedding, threads=self.threads)

    def remove(self, ids: Ids) -> None:
        for graph in self.worlds.values():
            here = np.asarray(graph.contains(ids.astype(np.uint64)))
            for id in ids[here].tolist():
                graph.remove(id)
        self.worlds = {name: graph for name, graph in self.worlds.items() if len(graph)}

    def search(self, queries: NDArray[np.float32], k: int, world: str | None) -> Hits:
        asked = self.worlds if world is None else {world} & self.worlds.keys()
        parts = [[_hits(self.worlds[name], query, k) for query in queries] for name in asked]
        return nearest(parts, len(queries), k)


def _hits(graph: Any, query: NDArray[np.float32], k: int) -> tuple[Ids, NDArray[np.float64]]:
    matches = graph.search(query, k, threads=1)
    return matches.keys.astype(np.int64), matches.distances.astype(np.float64)
