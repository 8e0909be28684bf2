"""Writing the files of a run: errors name the file and say what to do; files are replaced
atomically.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ANOTHER = "make it writable, or give another --output"
ADVICE = {
    errno.ENOSPC: "free some space, then the same command resumes",
    errno.EDQUOT: "free some space, then the same command resumes",
    errno.EFBIG: "allow larger files (ulimit -f), then the same command resumes",
    errno.EACCES: ANOTHER,
    errno.EPERM: ANOTHER,
    errno.EROFS: ANOTHER,
    errno.EEXIST: "a file is where a folder is meant: move it, or give another --output",
    errno.ENOTDIR: "a file is where a folder is meant: move it, or give another --output",
    errno.EISDIR: "a folder is where a file is meant: move it, or give another --output",
    errno.ENOENT: "make its folder, or give another --output",
    errno.ELOOP: "its links lead in a circle: remove them, or give another --output",
}


class OutputError(ValueError):
    """The message names the file that cannot be written, and says what to do."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of writing inside, also by safetensors, into an OutputError."""
    try:
        yield
    except OSError as error:
        raise _named(path, error.errno or 0, error.strerror or str(error)) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        cause = re.search(r"([^:]*) \(os error (\d+)\)", str(error))
        number, why = (int(cause[2]), cause[1].strip()) if cause else (0, str(error))
        raise _named(path, number, why) from error


def _named(path: Path, number: int, why: str) -> OutputError:
    advice = ADVICE.get(number)
    return OutputError(f"{path}: cannot be written ({why})" + (f": {advice}" if advice else ""))


def replace(path: Path, content: bytes) -> None:
    """Replace the file atomically: it holds either its old contents or all of `content`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path):
            partial.write_bytes(content)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_json(path: Path, value: Any) -> None:
    """The same with a value as JSON, which has no NaN and no infinity: those become null."""
    replace(path, (json.dumps(_finite(value), indent=1, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
