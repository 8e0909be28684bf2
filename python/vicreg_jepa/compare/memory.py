"""Peak memory: what an action needs above what is there already.

On a GPU the allocator's own count. On the CPU the process's resident memory as the kernel counts
it, so an honest figure needs a process of its own: freed memory stays resident and would hide the
next peak. `in_own_process` gives one, `in_own_exact_process` one that gives freed memory back.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

# Read by OpenMP as it loads. Its threads spin while they wait for each other, which on cores that
# other programs want too takes ten times as long: a step of 490 ms took 4900.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}

# From this size on glibc maps an allocation by itself; set, it no longer rises with what is freed.
_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"

_CHUNK = 1 << 20


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments) in a fresh interpreter; its exceptions are raised here.

    An ENVIRONMENT variable that is set already keeps its value.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def in_own_exact_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """`in_own_process` where, if glibc is its malloc, freed tensors leave the process at once.

    Else glibc keeps what was freed, by its history more or less: the same peak of live tensors was
    100 to 150 MiB resident. Slower, so for counting alone.
    """
    before = os.environ.get(_THRESHOLD)
    os.environ[_THRESHOLD] = str(128 * 1024)
    try:
        return in_own_process(function, *arguments)
    finally:
        if before is None:
            del os.environ[_THRESHOLD]
        else:
            os.environ[_THRESHOLD] = before


def resident_peak() -> int:
    """The most memory this process ever had resident, in bytes.

    VmHWM where there is one: a child's ru_maxrss begins at its parent's.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory:
    """From its making on: `extra()` bytes at the peak, above what was held then."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.held = torch.cuda.memory_allocated(device)
        else:
            self.ballast = _fill_to_peak()
            self.held = resident_peak()

    def extra(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.held
        return resident_peak() - self.held


def _fill_to_peak() -> list[torch.Tensor]:
    """Hold memory until the process is as large as it ever was: what follows then shows whole."""
    ballast: list[torch.Tensor] = []
    peak = resident_peak()
    while resident_peak() < peak + _CHUNK:
        ballast.append(torch.ones(_CHUNK, dtype=torch.uint8))
    return ballast
