"""Lists the files of a folder that a run reads. Hidden files are left out, with a message; links
are followed; a path that is not a regular file (a pipe, a socket, a device) is refused before it is
opened.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# Folders with unwanted copies, which a Mac's zip and a Synology create beside images.
COPIES = ("@eaDir", "__MACOSX")


def hidden(name: str) -> bool:
    """Whether a file or folder is hidden by its own name."""
    return name.startswith(".") or name in COPIES


def regular(path: str | Path, what: str) -> Path:
    """Return path if it is a regular file or a link to one; else raise a ValueError that begins
    with `what`.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if not os.path.islink(path):
            raise ValueError(f"{what}: {str(path)!r} is no file ({error.strerror})") from error
        raise ValueError(
            f"{what}: {str(path)!r} is a link that leads nowhere ({os.readlink(path)!r})"
        ) from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{what}: {str(path)!r} is no regular file, and is not read")
    return Path(path)


def below(root: Path, takes: Callable[[str], bool], what: str) -> tuple[list[str], list[str]]:
    """(files, skipped): the files at any depth whose names `takes` accepts, and the hidden ones,
    relative to root and sorted by name. Links to folders are followed, except to a folder that
    contains the link. Raises ValueError if an accepted name is not a regular file.
    """
    names: list[str] = []
    skipped: list[str] = []

    def enter(place: str, above: frozenset[tuple[int, int]]) -> None:
        here = os.stat(root / place)
        inside = above | {(here.st_dev, here.st_ino)}
        if len(inside) == len(above):
            skipped.append(place)
            return
        with os.scandir(root / place) as entries:
            for entry in entries:
                name = os.path.join(place, entry.name)
                if hidden(entry.name):
                    if takes(entry.name) or entry.is_dir():
                        skipped.append(name)
                elif entry.is_dir():
                    enter(name, inside)
                elif takes(entry.name):
                    if not entry.is_file():
                        regular(root / name, what)
                    names.append(name)

    enter("", frozenset())
    return sorted(names, key=_parts), sorted(skipped, key=_parts)


def _parts(name: str) -> list[str]:
    return name.split(os.sep)


def tell(what: str, names: Sequence[str]) -> None:
    """Print one line for all names, from one process of a run."""
    if names and os.environ.get("RANK", "0") == "0":
        more = ", ..." if len(names) > 3 else ""
        print(f"{what} ({', '.join(map(repr, names[:3]))}{more})", file=sys.stderr)


def skip(what: str, where: object, names: Sequence[str]) -> None:
    """Print which hidden files are left out."""
    are = "file is" if len(names) == 1 else "files are"
    tell(f"{what}: {str(where)!r}: {len(names)} hidden {are} skipped", names)
