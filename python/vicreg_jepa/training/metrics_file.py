"""A run's log, metrics.jsonl: one row of JSON per logged step, each step once."""

from __future__ import annotations

import json
from pathlib import Path

from vicreg_jepa.files import output

NAME = "metrics.jsonl"


def take_up(path: Path, step: int) -> None:
    """Keep only the complete rows up to `step`, the step of the checkpoint from which a run
    resumes. The resumed run writes the later rows again. Raises OutputError.
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
