"""Rows as the database holds them."""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vicreg_jepa.memory import database
from vicreg_jepa.memory.database import StoreError
from vicreg_jepa.memory.rows import EMBEDDING, PLACE, Format, Rows, checksum, unpacked

SELECT = """SELECT rows.id, episode, session, world, time, surprise, place, action, outcome,
    embedding, checksum, uses FROM rows LEFT JOIN episodes ON episodes.id = rows.episode"""


def format_of(connection: sqlite3.Connection, path: Path) -> Format:
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


def rows_of(piece: Sequence[Sequence[Any]], path: Path, format: Format) -> Rows:
    """One or more rows, as SELECT gives them. Raises StoreError for one that is damaged."""
    for values in piece:
        if not sound(values, format):
            raise StoreError(f"store: {str(path)!r}: row {values[0]} is damaged{database.DAMAGED}")
    id, episode, session, world, time, surprise, *blobs, _, uses = zip(*piece, strict=True)
    place, action, outcome, embedding = blobs
    return Rows(
        id=np.array(id, np.int64),
        world=np.array(world, object),
        session=np.array(session, np.int64),
        episode=np.array(episode, np.int64),
        time=np.array(time, np.int64),
        embedding=unpacked(embedding, format.embedding, EMBEDDING),
        place=unpacked(place, format.place, PLACE),
        action=unpacked(action, format.action, EMBEDDING),
        outcome=unpacked(outcome, format.outcome, EMBEDDING),
        surprise=np.array(surprise, np.float64),
        uses=np.array(uses, np.int64),
    )


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
