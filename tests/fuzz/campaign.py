"""Many lines of one op: draws them by seed, runs them, and counts what came."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from tests.fuzz import known, ops, runner
from tests.fuzz.inputs import Draw


@dataclass
class Report:
    """counts: lines by what came; faults: (seed, message, line); open: of known faults, counts."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, str, str]] = field(default_factory=list)
    open: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        parts = [f"{self.counts[kind]} {kind}" for kind in sorted(self.counts)]
        words = [", ".join(parts)]
        words += [f"  known, {count} times: {reason}" for reason, count in self.open.items()]
        words += [f"  seed {seed}: {what}\n    {line}" for seed, what, line in self.faults]
        return "\n".join(words)


def line_of(seed: str) -> str:
    """seed: the op's name, "/", and anything."""
    return ops.GENERATORS[seed.split("/", 1)[0]](Draw(seed))


@contextmanager
def one_thread() -> Iterator[None]:
    """Calls so small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(
    seeds: Iterator[str],
    seconds: float = float("inf"),
    most: int = 20,
    before: Callable[[str], object] = lambda line: None,
) -> Report:
    """Until `seeds` end, `seconds` have passed or `most` lines have failed; `before` sees each line
    first.
    """
    report, end = Report(), time.monotonic() + seconds
    for seed in seeds:
        if time.monotonic() > end or len(report.faults) >= most:
            break
        line = line_of(seed)
        if (reason := known.crash(line)) is not None:
            report.counts["not run"] += 1
            report.open[reason] += 1
            continue
        before(f"seed {seed}: {line}")
        try:
            report.counts[runner.hold(line)] += 1
        except runner.Unusable:
            report.counts["unusable"] += 1
        except runner.Fault as fault:
            if (reason := known.reason(line, str(fault))) is not None:
                report.counts["known"] += 1
                report.open[reason] += 1
            else:
                report.counts["fault"] += 1
                report.faults.append((seed, str(fault), line))
    return report
