"""What a controller of environments calls: remember, recall, and say what was of use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.memory.rows import LARGEST, Found, Ids, array, whole
from vicreg_jepa.memory.writer import Writer


class Memory:
    """The memory of a controller of N environments over one episode of each. An object begins the
    episodes; the next ones, also those of a later process, begin with the next object on the same
    store, and find what these have remembered.

    store: the writer; several objects may have the same. worlds: the names of the environments'
    worlds, N. A world is what stays the same between visits, such as a maze with its layout: rows
    are recalled in worlds of the same name.

    Numbers may be arrays or tensors on any device; what is recalled is in arrays, which
    torch.from_numpy takes without a copy.

    Raises ValueError that names the argument, StoreError.
    """

    def __init__(self, store: Writer, worlds: Sequence[str]) -> None:
        if not isinstance(store, Writer):
            raise ValueError(f"store: got {type(store).__name__}, takes a Writer")
        self.store = store
        self.episodes = store.begin(worlds)
        self.worlds = list(worlds)

    def remember(
        self,
        time: int,
        embeddings: Any,
        places: Any,
        actions: Any,
        outcomes: Any,
        surprises: Any,
        active: Any = None,
    ) -> Ids:
        """Remember a step of every environment: what was seen, what was done, what came of it.

        time: the step. embeddings: [N, D], of the observations. places: [N, P], or None where they
        are not known. actions: [N, A]. outcomes: [N, O], for example the embeddings of the
        observations that followed. surprises: [N], 0 or more, for example their distances to what
        the model had predicted. active: bool [N], the environments whose episodes go on; by default
        all.

        Returns the ids of the rows, int64 [N], or of the active ones. They are on the disk when it
        returns. Raises ValueError that names the argument, StoreError.
        """
        whole("time", time, 0)
        going = np.ones(len(self.worlds), bool) if active is None else self._each("active", active)
        if going.dtype != bool:
            raise ValueError(f"active: got {going.dtype}, takes bool")
        values = {
            "embeddings": embeddings,
            "places": places,
            "actions": actions,
            "outcomes": outcomes,
            "surprises": surprises,
        }
        rows = {
            argument: None if value is None else self._each(argument, value)[going]
            for argument, value in values.items()
        }
        episodes = self.episodes[going]
        return self.store.write(episodes, np.full(len(episodes), time), **rows)

    def recall(self, queries: Any, k: int, everywhere: bool = False) -> list[Found]:
        """For each environment the k rows whose embeddings are nearest to its query, of its own
        world, or of all worlds; fewer if there are fewer. queries: floats [N, D].

        Raises ValueError that names the argument, StoreError.
        """
        queries = self._each("queries", queries)
        if everywhere:
            return self.store.nearest(queries, k)
        return self._by_world(queries, lambda some, world: self.store.nearest(some, k, world))

    def recall_around(
        self, places: Any, k: int, first: int = 0, last: int = LARGEST
    ) -> list[Found]:
        """For each environment the k rows of its world whose places are nearest to a place, of the
        steps from first to last of an episode. places: floats [N, P].

        Raises ValueError that names the argument, StoreError.
        """
        places = self._each("places", places)
        return self._by_world(
            places, lambda some, world: self.store.around(some, k, world, first, last)
        )

    def _by_world(
        self, rows: NDArray[Any], search: Callable[[NDArray[Any], str], list[Found]]
    ) -> list[Found]:
        """One search for each world, with the rows of all its environments."""
        results: dict[int, Found] = {}
        for world in dict.fromkeys(self.worlds):
            numbers = [number for number, its in enumerate(self.worlds) if its == world]
            results.update(zip(numbers, search(rows[numbers], world), strict=True))
        return [results[number] for number in range(len(self.worlds))]

    def used(self, found: Iterable[Found]) -> None:
        """Count one use of each row that was recalled and that a plan relied on: it stays longer.

        Raises StoreError.
        """
        ids = [one.rows.id for one in found]
        self.store.used(np.concatenate([np.empty(0, np.int64), *ids]))

    def _each(self, argument: str, value: Any) -> NDArray[Any]:
        """An array with a row for each environment."""
        rows = array(argument, value)
        if rows.ndim == 0 or len(rows) != len(self.worlds):
            raise ValueError(
                f"{argument}: got shape {list(rows.shape)}, takes {len(self.worlds)} rows, one for "
                "each environment"
            )
        return rows
