"""The SQLite file of a store: how it is opened, its schema and the versions of it, its one writer,
and errors that say what to do.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from vicreg_jepa.files import listing
from vicreg_jepa.memory.rows import Format, checksum

APPLICATION = 0x764A4D65  # of SQLite's header: the file is a store
PATIENCE = 10.0  # seconds that a connection waits for the lock of another

LEFT = "; what was committed is there"
DAMAGED = ": restore a copy; `sqlite3 STORE .recover` gives what can still be read"
# By SQLite's words: Python 3.10 has no codes.
ADVICE = {
    "is full": f": free some space{LEFT}",
    "disk I/O error": f": the disk, or a limit of a file's size (ulimit -f), refuses{LEFT}",
    "readonly": f": make the file and its folder writable{LEFT}",
    "unable to open": ": its folder must be there and writable, for readers too, which share the "
    "files STORE-wal and STORE-shm with the writer",
    "malformed": DAMAGED,
    "not a database": DAMAGED,
}


class StoreError(ValueError):
    """The message names the store, says what is wrong, and what to do."""


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Turns an error of SQLite inside into a StoreError."""
    try:
        yield
    except sqlite3.Error as error:
        advice = next((text for words, text in ADVICE.items() if words in str(error)), "")
        raise StoreError(f"store: {str(path)!r}: {error}{advice}") from error


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection; mode: "ro" to read, "rw" to write, "rwc" also to make the file. It has no
    transaction of its own accord.
    """
    uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=PATIENCE, isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


@contextmanager
def transaction(
    connection: sqlite3.Connection, path: Path, kind: str = "DEFERRED"
) -> Iterator[None]:
    """All of what is inside, or nothing; and it sees one committed state. kind: IMMEDIATE for one
    that writes.
    """
    with named(path):
        try:
            connection.execute(f"BEGIN {kind}")
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def reader(path: Path) -> sqlite3.Connection:
    """A connection that reads a store of this version. Raises StoreError if there is none."""
    listing.regular(path, "store")
    with named(path):
        connection = connect(path, "ro")
        try:
            version = version_of(connection, path)
            if not version:
                raise StoreError(f"store: {str(path)!r} is empty, takes a store")
            if version != VERSION:
                raise StoreError(
                    f"store: {str(path)!r} has version {version}, readers take {VERSION}: a writer "
                    "migrates it, also `vicreg-jepa memory STORE --migrate`"
                )
        except BaseException:
            connection.close()
            raise
    return connection


def writer(path: Path, format: Format | None = None) -> sqlite3.Connection:
    """A connection that writes a store; one of an older version is migrated, and with a format a
    new one is made. Every commit is on the disk when it returns.
    """
    if format is None:
        listing.regular(path, "store")
    with named(path):
        connection = connect(path, "rw" if format is None else "rwc")
        try:
            version = version_of(connection, path)
            if not version and format is None:
                raise StoreError(f"store: {str(path)!r} is empty, takes a store")
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise StoreError(
                    f"store: {str(path)!r}: its file system has no write-ahead log ({mode}), takes "
                    "a local disk"
                )
            connection.execute("PRAGMA synchronous = FULL")
            if version < VERSION:
                migrate(connection, path, format)
        except BaseException:
            connection.close()
            raise
    return connection


def version_of(connection: sqlite3.Connection, path: Path) -> int:
    """The version of a store, 0 of an empty file. Raises StoreError if it is another database, or
    of a later version.
    """
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application != APPLICATION and (application or version or tables):
        raise StoreError(f"store: {str(path)!r} is another SQLite database, takes a store")
    if version > VERSION:
        raise StoreError(
            f"store: {str(path)!r} has version {version}, takes at most {VERSION}: a later "
            "vicreg-kernels wrote it"
        )
    return version


def check_pages(connection: sqlite3.Connection, path: Path) -> None:
    """Raises StoreError if SQLite finds the structure of the file damaged."""
    found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        text = " ".join(found.split())
        raise StoreError(f"store: {str(path)!r} is damaged ({text}){DAMAGED}")


def migrate(
    connection: sqlite3.Connection, path: Path, format: Format | None = None, to: int | None = None
) -> None:
    """Bring a store to a version, by default the newest, in one transaction. format: of a new
    store, whose version is 0.
    """
    with transaction(connection, path, "EXCLUSIVE"):
        version = version_of(connection, path)  # inside: another may have migrated it
        for step in STEPS[version : VERSION if to is None else to]:
            step(connection)
            version += 1
            connection.execute(f"PRAGMA user_version = {version}")
        if format is not None:
            connection.execute(
                "INSERT OR IGNORE INTO store VALUES ('format', ?)", [format.written()]
            )


def _first(connection: sqlite3.Connection) -> None:
    """Rows, of episodes, of sessions. The embedding is last: pages of its bytes are not read where
    it is not asked for.
    """
    connection.execute(f"PRAGMA application_id = {APPLICATION}")
    for statement in (
        "CREATE TABLE store (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
        "CREATE TABLE sessions (id INTEGER PRIMARY KEY AUTOINCREMENT, begun REAL NOT NULL)",
        """CREATE TABLE episodes (id INTEGER PRIMARY KEY AUTOINCREMENT,
            session INTEGER NOT NULL REFERENCES sessions (id), world TEXT NOT NULL)""",
        """CREATE TABLE rows (id INTEGER PRIMARY KEY AUTOINCREMENT,
            episode INTEGER NOT NULL REFERENCES episodes (id), time INTEGER NOT NULL,
            surprise REAL NOT NULL, place BLOB, action BLOB NOT NULL, outcome BLOB NOT NULL,
            embedding BLOB NOT NULL)""",
        "CREATE INDEX rows_episode ON rows (episode)",
    ):
        connection.execute(statement)


def _second(connection: sqlite3.Connection) -> None:
    """Counts of use, an index that eviction reads without the rows, and checksums."""
    for statement in (
        "ALTER TABLE rows ADD COLUMN uses INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE rows ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX rows_worth ON rows (surprise, uses)",
        "INSERT INTO store VALUES ('evictions', '0')",
    ):
        connection.execute(statement)
    connection.create_function("row_checksum", 10, checksum, deterministic=True)
    connection.execute(
        """UPDATE rows SET checksum = row_checksum(id, episode,
            (SELECT session FROM episodes WHERE episodes.id = rows.episode),
            (SELECT world FROM episodes WHERE episodes.id = rows.episode),
            time, surprise, place, action, outcome, embedding)"""
    )


# What makes version 1 of an empty file, version 2 of version 1, and so on. A new store takes the
# same steps as an old one, so that both end the same. A step is never changed once it is released.
STEPS: tuple[Callable[[sqlite3.Connection], None], ...] = (_first, _second)
VERSION = len(STEPS)


class Lock:
    """Held by the one writer of a store: a lock of SQLite on the empty file STORE-writer, which the
    system takes back from a process that dies.
    """

    def __init__(self, path: Path) -> None:
        path = path.resolve()  # one lock, whatever link leads to the file
        beside = path.with_name(path.name + "-writer")
        try:
            self.connection = connect(beside, "rwc")
            self.connection.execute("PRAGMA busy_timeout = 0")
            self.connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            if hasattr(self, "connection"):
                self.connection.close()
            if "locked" not in str(error):
                with named(beside):
                    raise
            raise StoreError(
                f"store: {str(path)!r} has a writer, takes one at a time: close the other, or read "
                "with Reader"
            ) from error

    def close(self) -> None:
        self.connection.close()
