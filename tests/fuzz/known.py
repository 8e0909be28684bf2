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


# A magnitude of 100 or more, as Python prints it.
_LARGE = r"(\d{3,}\.0|e\+\d\d), "

KNOWN = (
    Known(
        r"^barlow_twins_loss.*e\+\d\d, ",
        r"nan where",
        "Barlow Twins is NaN where float32 does not hold a column's squares, as its page says",
    ),
    Known(
        r"^barlow_twins_loss\(x=T\(\([23], ",
        r"gradients \d: .*norm error",
        "Barlow's gradient of two or three rows cancels; the rule has no floor for it yet",
    ),
    Known(
        r"^barlow_twins_loss.*e-\d\d, .*eps=0\.0",
        r"nan where|norm error|inf where",
        "Barlow with eps=0 where float32 squares underflow",
    ),
    Known(
        r"^(vicreg|variance).*eps=0\.0",
        r"where the truth is nan",
        "eps=0 and a column without variance: the reference's gradient is 0/0, ours is a number",
    ),
    Known(
        r"^assemble_tokens.*positions=",
        r"values 0: not the reference's bits",
        "a float16 context with a float32 mask token and positions is one rounding off",
    ),
    Known(
        r"^sigreg_loss.*'offset'",
        r"norm error",
        "SIGReg at an offset of 100 deviations: angles lose digits; the rule has no floor for it",
    ),
    Known(
        r"^vicregl_.*'float16'",
        r"inf where",
        "VICRegL adds up parts of a float16 gradient that overflow",
    ),
    Known(
        rf"^masked_attention.*{_LARGE}",
        r"norm error|nan where",
        "attention's scores past 1e5 lose digits or become NaN",
    ),
)

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
