"""A progress bar with the time left, on standard error; tables go on to standard output."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

INSTALLED = importlib.util.find_spec("tqdm") is not None


def shown_by_default() -> bool:
    """On a terminal, where tqdm is installed."""
    return INSTALLED and sys.stderr.isatty()


class Bar:
    """Counts cases; none is drawn where `shown` is false."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, unit="case", file=sys.stderr, dynamic_ncols=True, leave=False
            )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, name: str) -> None:
        """Name what is measured now."""
        if self._bar is not None:
            self._bar.set_description(name)

    def done(self) -> None:
        """Count one case."""
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str, end: str = "\n") -> None:
        """Print to standard output, at once, with the bar out of the way."""
        if self._bar is None:
            print(text, end=end, flush=True)
            return
        with self._bar.external_write_mode(file=sys.stdout):
            print(text, end=end, flush=True)
