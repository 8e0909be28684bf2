"""The faults that are known and open. A line that breaks the rule in one of these ways is counted
and shown, and fails nothing; an entry goes when its fault is mended.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Known(NamedTuple):
    """line, message: regular expressions that the line and what the runner says both contain."""

    line: str
    message: str
    reason: str


KNOWN: tuple[Known, ...] = ()

# Lines that end the process, and are therefore not run: (regular expression, reason).
CRASHES: tuple[tuple[str, str], ...] = ()


def reason(line: str, message: str) -> str | None:
    """Why a line may break the rule; None where it may not."""
    for known in KNOWN:
        if re.search(known.line, line) and re.search(known.message, message):
            return known.reason
    return None


def crash(line: str) -> str | None:
    """Why a line is not run; None where it is."""
    return next((why for pattern, why in CRASHES if re.search(pattern, line)), None)
