"""Reads a store: rows in one SQLite file, which one process writes while any number read it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from vicreg_jepa.memory import database, stored
from vicreg_jepa.memory.database import StoreError
from vicreg_jepa.memory.index import Hits, Index, Scan, by_world, nearest
from vicreg_jepa.memory.rows import (
    EMBEDDING,
    LARGEST,
    PLACE,
    Found,
    Ids,
    Rows,
    integers,
    matrix,
    name,
    whole,
)
from vicreg_jepa.memory.scan import Vectors

AT_ONCE = 500  # ids of one query; SQLite takes 999 at least
PIECE = 8192  # rows that are read at once
Opened = TypeVar("Opened", bound="Reader")


class Reader:
    """Reads a store, also while a writer in this or another process writes.

    Each search sees one committed state of the store, the newest when it begins. An object belongs
    to the thread and the process that made it.

    path: the file, on a local disk. index: the search, by default exact.

    Raises ValueError that names the argument, and StoreError, a ValueError that begins with
    `store:`, if there is no store, it cannot be read, is of another version or is damaged: opening
    it checks every page and every row, and a row is held against its checksum whenever it is read.
    """

    def __init__(self, path: str | Path, index: Index | None = None) -> None:
        if index is not None and index.shared:
            raise ValueError(
                f"index: got {type(index).__name__}, which other processes see; only a writer "
                "takes it"
            )
        self.path = Path(path)
        self._open(database.reader(self.path), index)

    def _open(self, connection: sqlite3.Connection, index: Index | None) -> None:
        self._connection, self._process = connection, os.getpid()
        self._index: Index = Scan() if index is None else index
        self._places: dict[str, Vectors] = {}
        self._last, self._evictions = 0, -1  # of what the index has followed
        try:
            with self._transaction():
                database.check_pages(connection, self.path)
                self.format = stored.format_of(connection, self.path)
                self._catch_up()
        except BaseException:
            connection.close()
            raise

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._connection.close()

    def __len__(self) -> int:
        """The number of rows."""
        with self._transaction():
            return self._number("SELECT count(*) FROM rows")

    def worlds(self) -> list[str]:
        """The names of the worlds that there are rows of, sorted."""
        with self._transaction():
            found = self._connection.execute(
                "SELECT DISTINCT world FROM episodes WHERE id IN (SELECT episode FROM rows)"
            )
            return sorted(world for (world,) in found)

    def nearest(self, queries: Any, k: int, world: str | None = None) -> list[Found]:
        """The rows whose embeddings are nearest to queries.

        queries: floats [Q, D]. k: the number of rows, of each query. world: only rows of it; None:
        of all worlds.

        Returns Q results of k rows, or of all rows if there are fewer.

        Raises ValueError that names the argument, StoreError.
        """
        queries = matrix("queries", queries, None, self.format.embedding, EMBEDDING)
        whole("k", k, 1)
        if world is not None:
            name("world", world)
        with self._transaction():
            self._catch_up()
            return self._found(self._index.search(queries, k, world))

    def around(
        self, places: Any, k: int, world: str, first: int = 0, last: int = LARGEST
    ) -> list[Found]:
        """The rows whose places are nearest to `places`, of those whose place was known.

        places: floats [Q, P]. k: the number of rows, of each place. world: a place means something
        in one world alone. first, last: only rows of the steps from first to last of an episode.

        Returns Q results of k rows, or of all if there are fewer.

        Raises ValueError that names the argument, StoreError.
        """
        if not self.format.place:
            raise ValueError("places: got places, but the store's format has none")
        places = matrix("places", places, None, self.format.place, PLACE)
        whole("k", k, 1)
        name("world", world)
        whole("first", first, 0)
        whole("last", last, first)
        with self._transaction():
            self._catch_up()
            if world not in self._places:
                return self._found(nearest([], len(places), k))
            return self._found(self._places[world].search(places, k, first, last))

    def rows(self, ids: Any = None) -> Rows:
        """Rows by their ids, int64 [N], in the order of the ids; None: all, in the order of
        writing.

        Raises ValueError if there is no such row, StoreError.
        """
        wanted = None if ids is None else integers("ids", ids, None, least=1)
        with self._transaction():
            if wanted is None:
                return stored.joined(list(self._pieces()), self.format)
            found = self._read(wanted)
        if len(found) < len(np.unique(wanted)):
            missing = np.setdiff1d(wanted, found.id)
            raise ValueError(f"ids: got {missing[0]}, takes those of rows; it may be evicted")
        return found.take(np.searchsorted(found.id, wanted))

    def _transaction(self, kind: str = "DEFERRED") -> Any:
        if os.getpid() != self._process:
            raise StoreError(
                f"store: {str(self.path)!r} was opened by another process: open it in this one"
            )
        return database.transaction(self._connection, self.path, kind)

    def _number(self, query: str) -> int:
        found = self._connection.execute(query).fetchone()
        if found is None or not isinstance(found[0], int):
            raise StoreError(f"store: {str(self.path)!r}: its counts are damaged{database.DAMAGED}")
        return found[0]

    def _catch_up(self) -> None:
        """Bring the index to the state that the transaction sees."""
        evictions = self._number(
            "SELECT CAST(value AS INTEGER) FROM store WHERE name = 'evictions'"
        )
        if evictions != self._evictions:
            kept = [id for (id,) in self._connection.execute("SELECT id FROM rows")]
            gone = np.setdiff1d(self._index.ids(), np.array(kept, np.int64))
            self._index.remove(gone)
            for places in self._places.values():
                places.remove(gone)
            self._evictions = evictions
        newest = self._number("SELECT coalesce(max(id), 0) FROM rows")
        if newest <= self._last:
            return
        for rows in self._pieces("WHERE rows.id > ?", [self._last]):
            self._index.add(rows)
            self._add_places(rows)
            self._last = int(rows.id[-1])

    def _add_places(self, rows: Rows) -> None:
        if not self.format.place:
            return
        known = rows.take(~np.isnan(rows.place[:, 0]))
        for world, its in by_world(known):
            if world not in self._places:
                self._places[world] = Vectors(self.format.place, np.dtype(PLACE.type))
            self._places[world].add(its.id, its.time, its.place)

    def _found(self, hits: Hits) -> list[Found]:
        ids = np.unique(np.concatenate([np.empty(0, np.int64), *(one for one, _ in hits)]))
        rows = self._read(ids)
        if len(rows) < len(ids):
            missing = np.setdiff1d(ids, rows.id)[0]
            raise StoreError(f"store: {str(self.path)!r}: the index has row {missing}, not there")
        return [
            Found(rows.take(np.searchsorted(ids, one)), np.sqrt(squared)) for one, squared in hits
        ]

    def _read(self, ids: Ids) -> Rows:
        """The rows with these ids that are there, in the order of the ids' values."""
        wanted, parts = np.unique(ids).tolist(), []
        for begin in range(0, len(wanted), AT_ONCE):
            some = wanted[begin : begin + AT_ONCE]
            marks = ", ".join("?" * len(some))
            parts += list(self._pieces(f"WHERE rows.id IN ({marks})", some))
        return stored.joined(parts, self.format)

    def _pieces(self, where: str = "", values: Sequence[int] = ()) -> Iterator[Rows]:
        cursor = self._connection.execute(f"{stored.SELECT} {where} ORDER BY rows.id", values)
        while piece := cursor.fetchmany(PIECE):
            yield stored.rows_of(piece, self.path, self.format)
