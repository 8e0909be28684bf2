"""The faults that are known and open: a line that breaks the rule in one of these ways is counted
and shown, and fails nothing. An entry goes when its fault is mended.
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


def reason(line: str, message: str) -> str | None:
    """Why a line may break the rule; None where it may not."""
    for known in KNOWN:
        if re.search(known.line, line) and re.search(known.message, message):
            return known.reason
    return None
