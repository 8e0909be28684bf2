"""What processes of gpu tests write line by line, for bench/gpu_select.py. Needs no pytest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Of a run of tests, in the order in which they are done.
PARTS = ("cuda", "triton", "memory")


def finished(records: Path) -> set[str]:
    """Tests that need not run again: those that ended, and those in which a process died."""
    return {line["test"] for line in read(records) if "test" in line}


def read(records: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of records; a killed process may leave half a line."""
    lines = records.read_text(errors="replace").splitlines() if records.exists() else []
    complete = []
    for line in lines:
        try:
            complete.append(json.loads(line))
        except ValueError:
            continue
    return complete
