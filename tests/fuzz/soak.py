"""`python -m tests.fuzz.soak [--calls 10000] [name ...]`: calls each op and each module with random
shapes and holds the process to its size after a warm-up. Prints a table; ends with 1 where
something grows.

Measured at the end of each fifth of the calls: the memory in use (`memory`), the objects that
Python's collector tracks, threads, file descriptors, and the entries of everything that the package
keeps from call to call (dicts, lists and the like in its modules, and its lru_caches). The first
fifth is the warm-up. An lru_cache or a `Kept` with a bound may fill up to it. A size grows where
the least of the last two fifths is above the second's by more than `ALLOWED`, so that one late
allocation of the allocator is no growth.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from tests.fuzz import campaign, known, modules, ops, runner
from tests.fuzz.inputs import Draw
from vicreg_kernels.core.kept import Kept

PARTS = 5
_GLIBC = ctypes.CDLL(None)
_CACHE = type(lru_cache(lambda: None))


class Size(NamedTuple):
    """kept: entries by the name of what holds them."""

    memory: float  # MiB
    objects: int  # of Python's, made since the start
    threads: int
    descriptors: int
    kept: dict[str, int]


# By how much a size may grow after the warm-up: the allocator's own movement, and the objects that
# a bounded cache still takes up. A leak of one list a call would be 6,000 objects in 10,000 calls.
ALLOWED = {"memory": 8.0, "objects": 2000, "threads": 0, "descriptors": 0}


def _inside(value: Any, seen: set[int]) -> Iterator[Any]:
    """value, and what functions close over and wrap."""
    if id(value) in seen:
        return
    seen.add(id(value))
    yield value
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield from _inside(cell.cell_contents, seen)
            except ValueError:  # an empty cell
                continue
    elif isinstance(value, type):
        for one in list(vars(value).values()):
            yield from _inside(one, seen)


def kept_by_package() -> dict[str, int]:
    """Entries of what each module keeps; of what has a bound, those beyond it."""
    entries: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in sorted(sys.modules.items()):
        if not name.startswith("vicreg_kernels"):
            continue
        for variable, value in list(vars(module).items()):
            for i, one in enumerate(_inside(value, seen)):
                where = f"{name}.{variable}" + f"[{i}]" * (i > 0)
                if isinstance(one, _CACHE):
                    if one.cache_info().maxsize is None:
                        entries[where] = one.cache_info().currsize
                elif isinstance(one, Kept):
                    entries[where] = max(0, len(one.held) - one.entries, one.bytes - one.nbytes)
                elif isinstance(one, (dict, list, set)) and not variable.startswith("__"):
                    entries[where] = len(one)
    return entries


def memory() -> float:
    """MiB of the process in RAM and in swap, without the pages that malloc holds but nobody uses.

    Those would hide a leak: it fills what earlier calls freed before the process grows.
    """
    _GLIBC.malloc_trim(0)
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return sum(int(lines[name].split()[0]) for name in ("VmRSS", "VmSwap")) / 2**10


def size() -> Size:
    gc.collect()
    return Size(
        memory(),
        len(gc.get_objects()),
        max(threading.active_count(), len(os.listdir("/proc/self/task"))),
        len(os.listdir("/proc/self/fd")),
        kept_by_package(),
    )


def op_step(op: str) -> Callable[[Draw], None]:
    """One line of the fuzzer, valid or not, forward and backward."""
    draw = ops.GENERATORS[op]

    def step(r: Draw) -> None:
        line = draw(r)
        if known.crash(line) is None:
            try:
                runner.evaluate(line)
            except runner.Unusable:
                return

    return step


def steps() -> dict[str, Callable[[Draw], None]]:
    return {**{op: op_step(op) for op in runner.OPS}, **modules.STEPS}


def soak(name: str, step: Callable[[Draw], None], calls: int) -> list[Size]:
    """The sizes after each fifth of the calls. What is there before stays frozen (gc.freeze), which
    costs nothing to look through, here and in the next soak.
    """
    sizes = []
    gc.collect()
    gc.freeze()
    for part in range(PARTS):
        for n in range(part * calls // PARTS, (part + 1) * calls // PARTS):
            step(Draw(f"{name}/{n}"))
        sizes.append(size())
    return sizes


def growth(sizes: list[Size]) -> list[str]:
    """What grew, in words."""
    words = []
    _, second, *_, fourth, last = sizes
    for what, allowed in ALLOWED.items():
        before = getattr(second, what)
        after = min(getattr(fourth, what), getattr(last, what))
        if after > before + allowed:
            words.append(f"{what} {before:.6g} -> {after:.6g}")
    for where, entries in last.kept.items():
        if entries > second.kept.get(where, 0) and fourth.kept[where] > second.kept.get(where, 0):
            words.append(f"{where} {second.kept.get(where, 0)} -> {entries} entries")
    return words


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(steps()))
    parser.add_argument("--calls", type=int, default=10000)
    options = parser.parse_args()
    failed = False
    print(f"{'':22}{'MiB':>16}{'objects':>18}{'threads':>9}{'files':>7}{'kept':>11}  grown")
    with campaign.one_thread():
        for name in options.names:
            sizes = soak(name, steps()[name], options.calls)
            one, two = sizes[1], sizes[-1]
            words = growth(sizes)
            failed |= bool(words)
            print(
                f"{name:22}{one.memory:8.1f}{two.memory:8.1f}{one.objects:9}{two.objects:9}"
                f"{one.threads:5}{two.threads:4}{one.descriptors:4}{two.descriptors:3}"
                f"{sum(one.kept.values()):6}{sum(two.kept.values()):5}  {'; '.join(words) or '-'}",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
