"""Processes that tests/trainer/test_memory_crashes.py runs beside itself: they need no torch, so
that each starts in a fraction of a second. `python -m tests.trainer.memory_processes WHAT STORE`.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from vicreg_jepa.memory import database
from vicreg_jepa.memory.reader import Reader
from vicreg_jepa.memory.rows import Format, Rows
from vicreg_jepa.memory.writer import Writer

FORMAT = Format(model="a test", embedding=16, place=2, action=2, outcome=3)
AT_ONCE = 4  # rows of a commit
QUERY = np.random.default_rng(7).standard_normal((2, FORMAT.embedding))
WORLDS = ("first", "second")


def drawn(number: int, count: int = AT_ONCE) -> dict[str, Any]:
    """What the commit of this number writes, beside its episodes and times."""
    draw = np.random.default_rng(number)
    return {
        "embeddings": draw.standard_normal((count, FORMAT.embedding)).astype(np.float32),
        "places": draw.uniform(0, 9, (count, FORMAT.place)),
        "actions": draw.uniform(-1, 1, (count, FORMAT.action)).astype(np.float32),
        "outcomes": draw.standard_normal((count, FORMAT.outcome)).astype(np.float32),
        "surprises": draw.exponential(size=count),
    }


def write(store: Writer, episodes: Any, number: int) -> None:
    store.write(np.resize(episodes, AT_ONCE), np.full(AT_ONCE, number), **drawn(number))


def filled(writer: Writer, numbers: range) -> None:
    """Write the commits of these numbers, in an episode of each world."""
    episodes = writer.begin(WORLDS)
    for number in numbers:
        write(writer, episodes, number)


def version_1(path: Path, commits: int) -> None:
    """A store as version 1 wrote it: without counts of use and checksums."""
    connection = database.connect(path, "rwc")
    connection.execute("PRAGMA journal_mode = WAL")
    database.migrate(connection, path, FORMAT, to=1)
    connection.execute("INSERT INTO sessions (begun) VALUES (1.5)")
    for world in WORLDS:
        connection.execute("INSERT INTO episodes (session, world) VALUES (1, ?)", [world])
    for number in range(commits):
        values = drawn(number)
        for i in range(AT_ONCE):
            blobs = [values[name][i].tobytes() for name in ("actions", "outcomes", "embeddings")]
            place = None if number == 2 else values["places"][i].tobytes()
            connection.execute(
                "INSERT INTO rows (episode, time, surprise, place, action, outcome, embedding) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [1 + i % 2, number, values["surprises"][i], place, *blobs],
            )
    connection.close()


def is_drawn(rows: Rows) -> bool:
    """Whether each row is what `write` wrote."""
    for i, id in enumerate(rows.id.tolist()):
        number, place = divmod(id - 1, AT_ONCE)
        for name, values in drawn(number).items():
            if not np.array_equal(getattr(rows, name.removesuffix("s"))[i], values[place]):
                return False
        if rows.time[i] != number or rows.world[i] != WORLDS[place % 2]:
            return False
    return True


def digest(store: Reader) -> str:
    """Of all bits that searches find, but for the counts of use and the sessions."""
    found = [*store.nearest(QUERY, 8), *store.nearest(QUERY, 5, "first")]
    found += store.around(QUERY[:, :2], 6, "second", last=10**6)
    summed = hashlib.sha256()
    for one in found:
        summed.update(one.distance.tobytes())
        for name in ("id", "time", "embedding", "place", "action", "outcome", "surprise"):
            summed.update(getattr(one.rows, name).tobytes())
        summed.update(repr(one.rows.world.tolist()).encode())
    return summed.hexdigest()


def commits(store: Reader) -> int:
    """The number of commits, and that none is there by half."""
    ids = store.rows().id
    last = int(ids[-1]) if len(ids) else 0
    assert last % AT_ONCE == 0
    return last // AT_ONCE


def writes(path: Path, most: str) -> None:
    """Commit for ever; say after each commit what is found."""
    with Writer(path, FORMAT, most=int(most)) as store:
        episodes = store.begin(WORLDS)
        number = commits(store)
        while True:
            store.used(store.nearest(QUERY[:1], 1)[0].rows.id)
            write(store, episodes, number)
            number += 1
            print(number, digest(store), flush=True)


def reads(path: Path, last: str) -> None:
    """See only whole commits, in order, until the last one is there."""
    seen, states = 0, set()
    with Reader(path) as store:
        print("ready", flush=True)
        while seen < int(last):
            rows = store.nearest(QUERY[:1], 10**6)[0].rows  # all of one state
            assert sorted(rows.id.tolist()) == list(range(1, len(rows) + 1))
            assert len(rows) % AT_ONCE == 0
            assert len(rows) >= AT_ONCE * seen
            seen = len(rows) // AT_ONCE
            states.add(seen)
        assert is_drawn(store.rows())
        print(len(states), digest(store), flush=True)


def is_killed_migrating(path: Path, rows: str) -> None:
    """Migrate, and be killed after some rows."""
    left = int(rows)

    def checksum(*values: Any) -> int:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    database.checksum = checksum
    Writer(path, FORMAT)


def is_limited(path: Path, room: str) -> None:
    """Write until the limit of a file's size is met, then without it."""
    import resource

    with Writer(path, FORMAT) as store:
        episodes, number = store.begin(WORLDS), 0
        write(store, episodes, number)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), resource.RLIM_INFINITY))
        try:
            while True:
                write(store, episodes, number + 1)
                number += 1
        except database.StoreError as error:
            print(error, flush=True)
        assert commits(store) == number + 1
        assert is_drawn(store.rows())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        write(store, episodes, number + 1)
        assert commits(store) == number + 2
    print(number + 2, flush=True)


WHAT: dict[str, Callable[[Path, str], None]] = {
    function.__name__: function for function in (writes, reads, is_killed_migrating, is_limited)
}

if __name__ == "__main__":
    WHAT[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
