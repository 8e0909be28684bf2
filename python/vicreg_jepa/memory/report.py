"""What a store holds, and whether it is sound: `vicreg-jepa memory STORE`."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

from vicreg_jepa.files import listing
from vicreg_jepa.memory import database, stored
from vicreg_jepa.memory.database import StoreError

SHOWN = 10  # worlds, and problems


def migrated(path: Path) -> tuple[int, int]:
    """Bring a store to the newest version; returns the version before and after. Raises StoreError
    if a writer has it, or it cannot be written.
    """
    listing.regular(path, "store")
    lock = database.Lock(path)
    try:
        with database.named(path):
            with closing(database.connect(path, "ro")) as connection:
                before = database.version_of(connection, path)
            database.writer(path).close()
    finally:
        lock.close()
    return before, database.VERSION


def written(path: Path) -> str:
    """The contents of a store, in some lines. Raises StoreError if it cannot be read."""
    connection = database.reader(path)
    try:
        with database.transaction(connection, path):
            return "\n".join(_lines(connection, path))
    finally:
        connection.close()


def _lines(connection: sqlite3.Connection, path: Path) -> list[str]:
    def one(query: str) -> tuple[float, ...]:
        return tuple(value or 0 for value in connection.execute(query).fetchone())

    sizes = stored.format_of(connection, path)
    rows, least, most, uses = one(
        "SELECT count(*), min(surprise), max(surprise), sum(uses) FROM rows"
    )
    (used,) = one("SELECT count(*) FROM rows WHERE uses > 0")
    episodes, sessions = one(
        "SELECT (SELECT count(DISTINCT episode) FROM rows), (SELECT count(*) FROM sessions)"
    )
    lines = [
        f"{path}: version {database.VERSION}, {_bytes(path) / 2**20:.1f} MiB with its log",
        f"embeddings of {sizes.model!r}: {sizes.embedding} numbers; place {sizes.place}, action "
        f"{sizes.action}, outcome {sizes.outcome}",
        f"{rows} rows of {episodes} episodes; surprise {least:.4g} to {most:.4g}; {used} rows "
        f"used, {uses} times",
    ]
    if sessions:
        last = connection.execute("SELECT begun FROM sessions ORDER BY id DESC").fetchone()[0]
        when = datetime.fromtimestamp(last, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        lines.append(f"{sessions} sessions, the last begun {when}")
    worlds = connection.execute(
        "SELECT world, count(*) FROM rows JOIN episodes ON episodes.id = episode GROUP BY world "
        "ORDER BY count(*) DESC, world"
    ).fetchall()
    lines += [f"world {world!r}: {count} rows" for world, count in worlds[:SHOWN]]
    if len(worlds) > SHOWN:
        lines.append(f"and {len(worlds) - SHOWN} other worlds")
    return lines


def _bytes(path: Path) -> int:
    files = (path.with_name(path.name + suffix) for suffix in ("", "-wal"))
    return sum(file.stat().st_size for file in files if file.exists())


def problems(path: Path) -> list[str]:
    """What is wrong in a store: the structure of its file by SQLite's own check, rows without an
    episode, and rows whose checksums differ. None of them is no line.

    Raises StoreError if it cannot be read at all.
    """
    connection = database.reader(path)
    found: list[str] = []
    try:
        with database.transaction(connection, path):
            sizes = stored.format_of(connection, path)
            for (text,) in connection.execute(f"PRAGMA integrity_check({SHOWN})"):
                found += [] if text == "ok" else text.splitlines()
            for table, row, _, _ in connection.execute("PRAGMA foreign_key_check"):
                found.append(f"{table}: row {row} belongs to nothing")
            for values in connection.execute(stored.SELECT):
                if not stored.sound(values, sizes):
                    found.append(f"row {values[0]} is damaged: its checksum differs")
    except StoreError as error:
        found.append(str(error))
    finally:
        connection.close()
    return found
