"""The places of one world that are remembered, and the ways between them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra

from vicreg_jepa.memory.rows import Rows

MERGED = 1.5  # pixels: nearer places are one node
JOINED = 3.5  # pixels: so near places are joined; across a wall of a maze they are 7 or more apart

Floats = NDArray[np.float64]


class Graph:
    """Nodes are places where the dot has been; an edge joins two that followed each other, or that
    are at most JOINED apart. What was walked can be walked back.
    """

    def __init__(self) -> None:
        self._places = np.empty((64, 2))
        self._times = np.zeros(64, np.int64)
        self._count = 0
        self._edges: dict[tuple[int, int], float] = {}
        self._last: int | None = None

    @staticmethod
    def of(rows: Rows) -> Graph:
        """The graph of the rows of one world, whose places are known."""
        graph = Graph()
        order = np.lexsort((rows.time, rows.episode))
        episode, time = None, -1
        for row in order.tolist():
            if rows.episode[row] != episode or rows.time[row] != time + 1:
                graph.leave()
            episode, time = rows.episode[row], rows.time[row]
            graph.add(rows.place[row], int(time))
        graph.leave()
        return graph

    def __len__(self) -> int:
        return self._count

    @property
    def places(self) -> Floats:
        """[M, 2]"""
        return self._places[: self._count]

    @property
    def times(self) -> NDArray[np.int64]:
        """[M]: when the dot was there last."""
        return self._times[: self._count]

    def leave(self) -> None:
        """The next place does not follow the last one."""
        self._last = None

    def add(self, place: Floats, time: int) -> int:
        """The dot is at a place [2]; returns its node."""
        distance = self.from_nodes(place)
        node = int(distance.argmin()) if len(distance) else -1
        if node < 0 or distance[node] > MERGED:
            near = np.flatnonzero(distance <= JOINED)
            node = self._count
            if node == len(self._places):
                self._places = np.concatenate([self._places, np.empty_like(self._places)])
                self._times = np.concatenate([self._times, np.zeros_like(self._times)])
            self._places[node] = place
            self._count += 1
            self._edges |= {(node, int(other)): float(distance[other]) for other in near}
        self._times[node] = time
        if self._last is not None and self._last != node:
            apart = float(np.linalg.norm(self._places[node] - self._places[self._last]))
            self._edges[max(self._last, node), min(self._last, node)] = apart
        self._last = node
        return node

    def from_nodes(self, place: Floats) -> Floats:
        """[M]: the distance of each node to a place [2], as the crow flies."""
        return np.asarray(np.linalg.norm(self.places - place, axis=1))

    def nearest(self, place: Floats) -> int:
        return int(self.from_nodes(place).argmin())

    def ways(self, node: int) -> tuple[Floats, NDArray[np.int32]]:
        """([M], [M]): the lengths of the shortest ways from a node, infinite where there is none,
        and the node before each on its way, negative at the beginning.
        """
        first, second = np.array([*self._edges], np.int64).reshape(-1, 2).T
        lengths = np.maximum(np.array([*self._edges.values()]), 1e-6)  # 0 would be no edge
        matrix = coo_matrix((lengths, (first, second)), shape=(len(self),) * 2)
        found = dijkstra(matrix.tocsr(), directed=False, indices=node, return_predecessors=True)
        return found[0], found[1]

    def way(self, before: NDArray[np.int32], node: int) -> Floats:
        """[L, 2]: the places on the way to a node, `before` as of `ways`, both ends included."""
        nodes = [node]
        while before[nodes[-1]] >= 0:
            nodes.append(int(before[nodes[-1]]))
        return np.asarray(self.places[nodes[::-1]])


def ahead(here: Floats, way: Floats, reach: float) -> Floats:
    """The place [2] on a way [L, 2] that is `reach` pixels of walking after `here`, or its end."""
    for there in way:
        apart = float(np.linalg.norm(there - here))
        if apart >= reach:
            return np.asarray(here + (there - here) * reach / apart)
        reach, here = reach - apart, there
    return here
