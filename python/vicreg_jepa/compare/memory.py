"""Peak memory: the memory that an action needs in addition to that already held.

On a GPU it is the allocator's count. On the CPU it is the resident memory of the process, as the
operating system counts it. Freed memory stays resident and would hide the next peak, so each figure
needs its own process: `in_own_process` starts one, `in_own_exact_process` one that returns freed
memory.
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

# OpenMP reads this when it is loaded. By default its threads spin while they wait for each other,
# which on cores shared with other programs takes ten times as long: a step of 490 ms took 4900.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}

# glibc maps each allocation from this size on separately; if set, the size no longer grows with
# freed memory.
_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"

_CHUNK = 1 << 20


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Run function(*arguments) in a new interpreter; its exceptions are raised here.

    An ENVIRONMENT variable that is set already keeps its value.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def in_own_exact_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Like `in_own_process`, but with glibc's malloc freed tensors leave the process at once.

    Otherwise glibc keeps freed memory, more or less depending on its history: the same peak of live
    tensors was 100 to 150 MiB resident. This is slower, so use it only for counting.
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
    """The peak resident memory of this process, in bytes.

    It reads VmHWM if the system has it, because a child's ru_maxrss begins at its parent's.
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
    """Measures from its creation on: `extra()` is the peak in bytes above the memory held at
    creation.
    """

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
    """Hold memory until the process is as large as it ever was, so that all later growth shows."""
    ballast: list[torch.Tensor] = []
    peak = resident_peak()
    while resident_peak() < peak + _CHUNK:
        ballast.append(torch.ones(_CHUNK, dtype=torch.uint8))
    return ballast
