"""Many machines: a collection of the vector database Qdrant as the index of the writer's store,
with whole rows, so that other machines recall from the collection alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.memory.index import Hits
from vicreg_jepa.memory.rows import EMBEDDING, Format, Found, Ids, Rows, matrix, name, whole
from vicreg_jepa.memory.stored import joined

AT_ONCE = 256


class QdrantIndex:
    """A collection of Qdrant, made if there is none, that follows the store of one writer. When the
    writer opens its store again, it adds what the collection lacks and removes what the store has
    no longer: the store is what lasts.

    If the database does not answer, the writer raises the client's error: the row is in the store,
    and reaches the collection before the next search.

    client: a qdrant_client.QdrantClient. collection: its name, of this store alone. format: that of
    the store.

    Raises ImportError that says what to install, ValueError for another collection.
    """

    shared = True

    def __init__(self, client: Any, collection: str, format: Format) -> None:
        self.models = _models()
        name("collection", collection)
        self.client, self.collection = client, collection
        if not client.collection_exists(collection):
            vectors = self.models.VectorParams(
                size=format.embedding, distance=self.models.Distance.EUCLID
            )
            client.create_collection(collection, vectors_config=vectors)
        made = client.get_collection(collection).config.params.vectors
        if made.size != format.embedding or made.distance != self.models.Distance.EUCLID:
            raise ValueError(
                f"collection: got {collection!r} with {made.size} dimensions and {made.distance}, "
                f"takes {format.embedding} and Euclidean distances"
            )

    def ids(self) -> Ids:
        found: list[int] = []
        offset = None
        while True:
            points, offset = self.client.scroll(
                self.collection, limit=10_000, offset=offset, with_payload=False
            )
            found += [point.id for point in points]
            if offset is None:
                return np.array(found, np.int64)

    def add(self, rows: Rows) -> None:
        for begin in range(0, len(rows), AT_ONCE):
            some = rows.take(np.arange(begin, min(begin + AT_ONCE, len(rows))))
            there = self.client.retrieve(self.collection, some.id.tolist(), with_payload=False)
            some = some.take(~np.isin(some.id, [point.id for point in there]))
            points = [
                self.models.PointStruct(
                    id=int(some.id[i]), vector=some.embedding[i].tolist(), payload=_payload(some, i)
                )
                for i in range(len(some))
            ]
            if points:
                self.client.upsert(self.collection, points=points, wait=True)

    def remove(self, ids: Ids) -> None:
        if len(ids):
            self.client.delete(self.collection, points_selector=ids.tolist(), wait=True)

    def search(self, queries: NDArray[np.float32], k: int, world: str | None) -> Hits:
        return [
            (
                np.array([point.id for point in points], np.int64),
                np.square(np.array([point.score for point in points], np.float64)),
            )
            for points in _asked(self, queries, k, world, whole_rows=False)
        ]


class QdrantReader:
    """Recalls on any machine from a collection that a QdrantIndex fills elsewhere.

    client: a qdrant_client.QdrantClient. collection: its name. format: that of the store, whose
    model must be the one that embeds the queries.
    """

    def __init__(self, client: Any, collection: str, format: Format) -> None:
        self.models = _models()
        name("collection", collection)
        self.client, self.collection, self.format = client, collection, format

    def nearest(self, queries: Any, k: int, world: str | None = None) -> list[Found]:
        """As Reader.nearest, with Qdrant's distances and, among many rows, its misses. `uses` is
        the count when the row was added to the collection.

        Raises ValueError that names the argument, and the client's errors.
        """
        queries = matrix("queries", queries, None, self.format.embedding, EMBEDDING)
        whole("k", k, 1)
        return [
            Found(
                joined([_row(point) for point in points], self.format),
                np.array([point.score for point in points], np.float64),
            )
            for points in _asked(self, queries, k, world, whole_rows=True)
        ]


def _models() -> Any:
    try:
        from qdrant_client import models
    except ImportError as error:
        raise ImportError(
            f"this index needs qdrant-client: pip install qdrant-client ({error})"
        ) from error
    return models


def _asked(
    of: QdrantIndex | QdrantReader,
    queries: NDArray[np.float32],
    k: int,
    world: str | None,
    whole_rows: bool,
) -> list[Sequence[Any]]:
    """The points of each query."""
    models, only = of.models, None
    if world is not None:
        match = models.FieldCondition(key="world", match=models.MatchValue(value=world))
        only = models.Filter(must=[match])
    return [
        of.client.query_points(
            of.collection,
            query=query.tolist(),
            limit=k,
            query_filter=only,
            with_payload=whole_rows,
            with_vectors=whole_rows,
        ).points
        for query in queries
    ]


NUMBERS, LISTS = ("session", "episode", "time", "surprise", "uses"), ("action", "outcome")


def _payload(rows: Rows, i: int) -> dict[str, Any]:
    return {
        "world": rows.world[i],
        # JSON has no NaN: null is one in an array of floats.
        "place": [None if np.isnan(value) else float(value) for value in rows.place[i]],
        **{key: getattr(rows, key)[i].item() for key in NUMBERS},
        **{key: getattr(rows, key)[i].tolist() for key in LISTS},
    }


def _row(point: Any) -> Rows:
    its = point.payload
    columns: dict[str, Any] = {key: np.array([its[key]]) for key in NUMBERS}
    floats: dict[str, Any] = {key: np.array([its[key]], np.float32) for key in LISTS}
    return Rows(
        id=np.array([point.id], np.int64),
        world=np.array([its["world"]], object),
        embedding=np.array([point.vector], np.float32),
        place=np.array([its["place"]], np.float64),
        **columns,
        **floats,
    )
