"""One run at a time in a folder: a lock that names its holder.

The operating system holds the lock and releases it when the process ends for any reason. On a file
system without locks, and between hosts, the process and host named in the file decide.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vicreg_jepa.files import output

NAME = "lock"
_own: set[tuple[int, int]] = set()  # files that this process holds: the system lets it lock twice


class Held(ValueError):
    """Another run trains in the folder."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A context in which no other process trains in the folder. Raises Held, and OutputError."""
    path = folder / NAME
    with output.writing(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        status = os.fstat(file)
        this = status.st_dev, status.st_ino
        if this in _own:
            raise _held(path, os.getpid(), socket.gethostname())
        _take(path, file)
        _own.add(this)
        try:
            yield
        finally:
            _own.discard(this)
            os.ftruncate(file, 0)
    finally:
        os.close(file)  # which releases the lock


def _take(path: Path, file: int) -> None:
    locked, kernel = True, True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        locked = error.errno not in (errno.EACCES, errno.EAGAIN)
        kernel = not locked  # any other error: the file system has no locks
    pid, host = _holder(file)
    here = socket.gethostname()
    if not locked:
        raise _held(path, pid, host)
    if pid is not None and (host != here or (not kernel and _alive(pid))):
        raise _held(path, pid, host)
    with output.writing(path):
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps({"pid": os.getpid(), "host": here}).encode(), 0)


def _holder(file: int) -> tuple[int | None, str]:
    """The process and host that the file names; None if it names none."""
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        return int(holder["pid"]), str(holder["host"])
    except (ValueError, TypeError, KeyError):
        return None, ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _held(path: Path, pid: int | None, host: str) -> Held:
    who = "another process" if pid is None else f"process {pid} on {host}"
    return Held(
        f"{path.parent}: {who} trains in it; give another --output, or, if that run is over, "
        f"remove {path}"
    )
