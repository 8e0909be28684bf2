"""A run's log, metrics.jsonl: a row of JSON a step, each step once."""

from __future__ import annotations

import json
from pathlib import Path

from vicreg_jepa.files import output

NAME = "metrics.jsonl"


def take_up(path: Path, step: int) -> None:
    """Leaves the rows up to `step`, the checkpoint that a run goes on from: what a killed run wrote
    after it is written again, and half a line would fuse with the next. Raises OutputError.
    """
    with output.writing(path):
        if not path.exists():
            return
        if not path.is_file():
            raise output.OutputError(
                f"{path}: is no regular file: move it, or give another --output"
            )
        before = path.read_bytes()
    rows: dict[int, bytes] = {}
    for line in before.splitlines():
        number = _step(line)
        if number is not None and number <= step:
            rows.setdefault(number, line)
    after = b"".join(rows[number] + b"\n" for number in sorted(rows))
    if after != before:
        output.replace(path, after)


def _step(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None
