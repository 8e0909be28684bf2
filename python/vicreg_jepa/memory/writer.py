"""Writes a store: the one process that adds rows to it, and evicts them."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.files import listing
from vicreg_jepa.memory import database, eviction
from vicreg_jepa.memory.index import Index
from vicreg_jepa.memory.reader import Reader
from vicreg_jepa.memory.rows import (
    EMBEDDING,
    PLACE,
    Format,
    Ids,
    array,
    checksum,
    integers,
    matrix,
    name,
    packed,
    whole,
)

SMALLEST = 16


class Writer(Reader):
    """The one writer of a store, which it makes if there is none. It reads as Reader does.

    What a method has written is on the disk when it returns, whatever happens to the process or the
    machine then; what it could not write whole is not there at all. Opening it migrates a store of
    an older version and begins a session.

    path: the file, on a local disk; it makes no folder. format: what the rows are made of. most:
    the most rows that the store holds, at least 16; when there are more, those of the least worth
    are evicted (eviction.py has the rule).

    Raises as Reader does; also if there is another writer, or the store has another format.
    """

    def __init__(
        self,
        path: str | Path,
        format: Format,
        most: int = 100_000,
        index: Index | None = None,
    ) -> None:
        if not isinstance(format, Format):
            raise ValueError(f"format: got {type(format).__name__}, takes a Format")
        whole("most", most, SMALLEST)
        self.path, self.most = Path(path), most
        if self.path.exists():
            listing.regular(self.path, "store")
        self._lock = database.Lock(self.path)
        try:
            self._open(database.writer(self.path, format), index)
            if self.format != format:
                raise ValueError(f"format: got {format}, the store {str(path)!r} has {self.format}")
            self._count = len(self)
            self.session = self._begin_session()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file and let another write; a second call does nothing."""
        if hasattr(self, "_connection"):
            super().close()
        self._lock.close()

    def _begin_session(self) -> int:
        with self._transaction("IMMEDIATE"):
            cursor = self._connection.execute(
                "INSERT INTO sessions (begun) VALUES (?)", [clock.time()]
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def begin(self, worlds: Sequence[str]) -> Ids:
        """Begin an episode in each of N worlds, by their names: the same name is the same world,
        also in a later session.

        Returns the episodes, int64 [N]. Raises ValueError that names the argument, StoreError.
        """
        if isinstance(worlds, str) or not isinstance(worlds, Sequence):
            raise ValueError(f"worlds: got {worlds!r}, takes a list of names")
        for world in worlds:
            name("worlds", world)
        episodes = []
        with self._transaction("IMMEDIATE"):
            for world in worlds:
                cursor = self._connection.execute(
                    "INSERT INTO episodes (session, world) VALUES (?, ?)", [self.session, world]
                )
                episodes.append(cursor.lastrowid)
        return np.array(episodes, np.int64)

    def write(
        self,
        episodes: Any,
        times: Any,
        embeddings: Any,
        places: Any,
        actions: Any,
        outcomes: Any,
        surprises: Any,
    ) -> Ids:
        """Write N rows, all of them or none, and evict others if the space ends.

        episodes: int64 [N], of `begin`. times: int64 [N], the steps of the episodes. embeddings:
        [N, D]; places: [N, P], or None where they are not known; actions: [N, A]; outcomes: [N, O];
        surprises: [N], 0 or more. Arrays or tensors of floats on any device; places and surprises
        are kept as float64, the others as float32. N: at most a quarter of `most`, which are safe
        from eviction.

        Returns the ids, int64 [N]. Raises ValueError that names the argument, StoreError.
        """
        made = integers("episodes", episodes, None, least=1)
        count, sizes = len(made), self.format
        if count > self.most // eviction.YOUNG:
            raise ValueError(
                f"episodes: got {count} rows, takes at most {self.most // eviction.YOUNG} at once, "
                f"a quarter of most={self.most}"
            )
        steps = integers("times", times, count)
        place: list[bytes | None] = [None] * count
        if places is not None:
            place = [*packed(matrix("places", places, count, sizes.place, PLACE), PLACE)]
        floats = {
            argument: packed(matrix(argument, value, count, size, EMBEDDING), EMBEDDING)
            for argument, value, size in (
                ("actions", actions, sizes.action),
                ("outcomes", outcomes, sizes.outcome),
                ("embeddings", embeddings, sizes.embedding),
            )
        }
        surprise = surprises_of(surprises, count)
        with self._transaction("IMMEDIATE"):
            begun = self._begun(made)
            last = self._number(
                "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'rows'"
            )
            ids = np.arange(last + 1, last + 1 + count)
            numbers = (steps.tolist(), surprise.tolist(), place, *floats.values())
            self._connection.executemany(
                "INSERT INTO rows (id, episode, time, surprise, place, action, outcome, embedding, "
                "checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (id, episode, *values, checksum(id, episode, *begun[episode], *values))
                    for id, episode, *values in zip(
                        ids.tolist(), made.tolist(), *numbers, strict=True
                    )
                ],
            )
            left = self._count + count - self._evict(self._count + count)
        self._count = left
        if self._index.shared:
            with self._transaction():
                self._catch_up()
        return ids

    def _begun(self, episodes: Ids) -> dict[int, tuple[int, str]]:
        """The session and the world of each episode."""
        begun = {}
        for episode in np.unique(episodes).tolist():
            query = "SELECT session, world FROM episodes WHERE id = ?"
            begun[episode] = self._connection.execute(query, [episode]).fetchone()
            if begun[episode] is None:
                raise ValueError(f"episodes: got {episode}, takes those that begin returned")
        return begun

    def _evict(self, count: int) -> int:
        """The number of rows that go, of `count` that are there."""
        if count <= self.most:
            return 0
        there = sorted(self._connection.execute("SELECT id, surprise, uses FROM rows"))
        id, surprise, uses = zip(*there, strict=True)
        gone = eviction.evicted(
            np.array(id, np.int64), np.array(surprise), np.array(uses, np.int64), self.most
        )
        self._connection.executemany("DELETE FROM rows WHERE id = ?", [[i] for i in gone.tolist()])
        self._connection.execute(
            "DELETE FROM episodes WHERE session < ? AND id NOT IN (SELECT episode FROM rows)",
            [self.session],
        )
        self._connection.execute(
            "UPDATE store SET value = CAST(value AS INTEGER) + 1 WHERE name = 'evictions'"
        )
        return len(gone)

    def used(self, ids: Any) -> None:
        """Count one use of each row, int64 [N], as often as it is named; rows that are evicted
        meanwhile are left out. Use keeps rows from eviction; it does not change what is found.

        Raises ValueError that names the argument, StoreError.
        """
        named = integers("ids", ids, None, least=1)
        with self._transaction("IMMEDIATE"):
            self._connection.executemany(
                "UPDATE rows SET uses = uses + 1 WHERE id = ?", [[i] for i in named.tolist()]
            )


def surprises_of(values: Any, count: int) -> NDArray[np.float64]:
    """float64 [count]. Raises ValueError if there is another number, or one is negative."""
    column = array("surprises", values)
    if column.ndim != 1:
        raise ValueError(f"surprises: got shape {list(column.shape)}, takes [{count}]")
    surprise: NDArray[np.float64] = matrix("surprises", column[:, None], count, 1, PLACE)[:, 0]
    if count and surprise.min() < 0:
        raise ValueError(f"surprises: got {surprise.min()}, takes 0 or more")
    return surprise
