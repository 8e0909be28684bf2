"""Types of command-line options."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, takes an integer from {least} to {most}"
            )
        return value

    return parse
