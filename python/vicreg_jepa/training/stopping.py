"""Ctrl-C and SIGTERM: the current step is finished and saved.

In a run of one process a second signal ends it at once. Several ranks first agree to stop
(rank_failure.py, trainer.py).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The run was stopped by a signal; `code` is the conventional exit code, 130 or 143."""

    def __init__(self, number: int, text: str = "") -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}{' (Ctrl-C)' if number == signal.SIGINT else ''}{text}")
        self.number, self.code = number, 128 + number


class Stop:
    """Records whether a signal has told the run to stop, and which (`told`).

    As a context it raises Stopped when a signal comes, or at the end of `deferred` if it comes
    inside. Outside of the main thread it does nothing, because Python handles signals only there.
    One of several ranks must not stop alone, so with several ranks the context is not entered and
    only `told` is set.
    """

    def __init__(self) -> None:
        self.told: int | None = None
        self.depth, self.pid = 0, os.getpid()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._signalled) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a forked worker: the main process ends it
            if number != signal.SIGINT:
                _default(number)
        elif self.told is not None:
            _default(number)
        else:
            self.told = number
            if not self.depth:
                raise Stopped(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        if self.told is not None and not self.depth and self.before:
            raise Stopped(self.told)


def _default(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
