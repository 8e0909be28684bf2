"""A store of rows in one SQLite file: any number of processes read it while one writes."""

from __future__ import annotations

import sqlite3
import struct
import time as clock
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.files import listing
from vicreg_jepa.memory import database, eviction
from vicreg_jepa.memory.database import StoreError
from vicreg_jepa.memory.index import Hits, Index, Scan, by_world, nearest
from vicreg_jepa.memory.rows import (
    EMBEDDING,
    LARGEST,
    PLACE,
    Format,
    Found,
    Ids,
    Rows,
    array,
    checksum,
    integers,
    matrix,
    name,
    packed,
    unpacked,
    whole,
)
from vicreg_jepa.memory.scan import Vectors

SELECT = """SELECT rows.id, episode, session, world, time, surprise, place, action, outcome,
    embedding, checksum, uses FROM rows LEFT JOIN episodes ON episodes.id = rows.episode"""
AT_ONCE = 500  # ids of one query; SQLite takes 999 at least
PIECE = 8192  # rows that are read at once
SMALLEST = 16
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
        self._connection = connection
        self._index: Index = Scan() if index is None else index
        self._places: dict[str, Vectors] = {}
        self._last, self._evictions = 0, -1  # of what the index has followed
        try:
            with self._transaction():
                database.check_pages(connection, self.path)
                self.format = stored_format(connection, self.path)
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
                return joined(list(self._pieces()), self.format)
            found = self._read(wanted)
        if len(found) < len(np.unique(wanted)):
            missing = np.setdiff1d(wanted, found.id)
            raise ValueError(f"ids: got {missing[0]}, takes those of rows; it may be evicted")
        return found.take(np.searchsorted(found.id, wanted))

    def _transaction(self, kind: str = "DEFERRED") -> Any:
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
        return joined(parts, self.format)

    def _pieces(self, where: str = "", values: Sequence[int] = ()) -> Iterator[Rows]:
        cursor = self._connection.execute(f"{SELECT} {where} ORDER BY rows.id", values)
        while piece := cursor.fetchmany(PIECE):
            yield self._checked(piece)

    def _checked(self, piece: Sequence[Sequence[Any]]) -> Rows:
        for values in piece:
            if not sound(values, self.format):
                raise StoreError(
                    f"store: {str(self.path)!r}: row {values[0]} is damaged{database.DAMAGED}"
                )
        id, episode, session, world, time, surprise, *blobs, _, uses = zip(*piece, strict=True)
        place, action, outcome, embedding = blobs
        sizes = self.format
        return Rows(
            id=np.array(id, np.int64),
            world=np.array(world, object),
            session=np.array(session, np.int64),
            episode=np.array(episode, np.int64),
            time=np.array(time, np.int64),
            embedding=unpacked(embedding, sizes.embedding, EMBEDDING),
            place=unpacked(place, sizes.place, PLACE),
            action=unpacked(action, sizes.action, EMBEDDING),
            outcome=unpacked(outcome, sizes.outcome, EMBEDDING),
            surprise=np.array(surprise, np.float64),
            uses=np.array(uses, np.int64),
        )


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
        if isinstance(worlds, str):
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
        found = {}
        for episode in np.unique(episodes).tolist():
            query = "SELECT session, world FROM episodes WHERE id = ?"
            found[episode] = self._connection.execute(query, [episode]).fetchone()
            if found[episode] is None:
                raise ValueError(f"episodes: got {episode}, takes those that begin returned")
        return found

    def _evict(self, count: int) -> int:
        """The number of rows that go, of `count` that are there."""
        if count <= self.most:
            return 0
        found = sorted(self._connection.execute("SELECT id, surprise, uses FROM rows"))
        id, surprise, uses = zip(*found, strict=True)
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


def stored_format(connection: sqlite3.Connection, path: Path) -> Format:
    found = connection.execute("SELECT value FROM store WHERE name = 'format'").fetchone()
    try:
        return Format.read(found[0])
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"store: {str(path)!r}: its format is damaged ({error}){database.DAMAGED}"
        ) from error


def sound(values: Sequence[Any], format: Format) -> bool:
    """Whether a row, as SELECT gives it, is what was written."""
    wanted = [8 * format.place, 4 * format.action, 4 * format.outcome, 4 * format.embedding]
    if values[6] is None:
        wanted[0] = 0
    try:
        right = [len(part or b"") for part in values[6:10]] == wanted
        return right and checksum(*values[:10]) == values[10]
    except (TypeError, AttributeError, struct.error):  # a damaged page may give other types
        return False


def joined(parts: Sequence[Rows], format: Format) -> Rows:
    """The rows of several pieces; none is no row of this format."""
    if len(parts) == 1:
        return parts[0]
    whole_numbers = np.empty(0, np.int64)
    empty = Rows(
        id=whole_numbers,
        world=np.empty(0, object),
        session=whole_numbers,
        episode=whole_numbers,
        time=whole_numbers,
        embedding=np.empty((0, format.embedding), np.float32),
        place=np.empty((0, format.place)),
        action=np.empty((0, format.action), np.float32),
        outcome=np.empty((0, format.outcome), np.float32),
        surprise=np.empty(0),
        uses=whole_numbers,
    )
    return Rows(
        **{
            column: np.concatenate([getattr(part, column) for part in (empty, *parts)])
            for column in vars(empty)
        }
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
