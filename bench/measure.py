"""How a step is timed, on the CPU and on a CUDA device, and against what ceilings.

Contenders take turns within a round (A B C, then B C A, ...), so that whatever the machine does
meanwhile falls on all of them, and a ratio is the median of the rounds' own ratios. A turn is one
untimed call, which leaves the caches as a training loop of that contender would, then a few timed
ones; its sample is their median. A contender too slow for that is called once a turn.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Any]

# Seconds: a turn's timed calls fill TURN, at most MOST_CALLS; from SLOW on a turn is one call.
TURN = 0.05
MOST_CALLS = 9
SLOW = 0.8
MOST_ROUNDS = 25
# Rounds that a contender takes part in at least; one of VERY_SLOW seconds a call needs no second.
LEAST_ROUNDS = 2
VERY_SLOW = 6.0


class WallClock:
    """Milliseconds of a call on the CPU."""

    def __call__(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3


class DeviceClock:
    """Milliseconds between events around a call on a CUDA device, with a cold L2.

    The write that evicts the L2 is also work for the device while the host enqueues the call; what
    the host still adds is part of the time, and absent from that of a graph's replay.
    """

    def __init__(self, device: torch.device) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self.flush = torch.empty(4 * cache, dtype=torch.int8, device=device)

    def __call__(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


class HostClock:
    """Milliseconds until a call returns; the device's queue is empty when it starts."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, step: Step) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3


def make_clock(device: torch.device) -> Callable[[Step], float]:
    return DeviceClock(device) if device.type == "cuda" else WallClock()


def gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """Forward and backward with the gradients of all inputs."""
    return lambda: torch.autograd.grad(loss(*inputs), inputs)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a baseline, specialised to the shapes it first sees."""
    return torch.compile(function, dynamic=False)


def capture(step: Step) -> Step | None:
    """The step as a CUDA graph's replay; None where it cannot be captured (it synchronises)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


@dataclass(frozen=True)
class Spread:
    """Milliseconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(
            ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]
        )


def _turn(step: Step, clock: Callable[[Step], float], estimate: float) -> float:
    """One sample, in milliseconds; estimate: seconds a call."""
    if estimate >= SLOW:
        return clock(step)
    clock(step)
    calls = max(1, min(MOST_CALLS, int(TURN / max(estimate, 1e-6))))
    return statistics.median(clock(step) for _ in range(calls))


def rounds_of(estimate: float, share: float) -> int:
    """How many rounds a step of `estimate` seconds a call takes part in, for `share` seconds."""
    calls = 1.0
    if estimate < SLOW:
        calls += max(1.0, min(MOST_CALLS, TURN / max(estimate, 1e-6)))
    least = LEAST_ROUNDS if estimate < VERY_SLOW else 1
    return max(least, min(MOST_ROUNDS, int(share / (calls * max(estimate, 1e-6)))))


def interleave(
    steps: dict[str, Step],
    clock: Callable[[Step], float],
    budget: float,
    estimates: dict[str, float],
) -> dict[str, list[float | None]]:
    """Each step's samples by round, in about `budget` seconds; None where it sat a round out.

    The budget is shared evenly; a slow step takes part in fewer rounds, spread over the run.
    estimates: seconds a call.
    """
    share = budget / max(len(steps), 1)
    rounds = {name: rounds_of(estimates[name], share) for name in steps}
    total = max(rounds.values(), default=0)
    samples: dict[str, list[float | None]] = {name: [] for name in steps}
    order = list(steps)
    for index in range(total):
        for name in order:
            wanted = rounds[name]
            # Bresenham: `wanted` of `total` rounds, evenly spread.
            takes_part = (index + 1) * wanted // total > index * wanted // total
            sample = _turn(steps[name], clock, estimates[name]) if takes_part else None
            samples[name].append(sample)
        order = order[1:] + order[:1]
    return samples


def ratio(samples: list[float | None], ours: list[float | None]) -> float | None:
    """Median over the rounds in which both took part."""
    pairs = [a / b for a, b in zip(samples, ours, strict=True) if a is not None and b is not None]
    return statistics.median(pairs) if pairs else None


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's profiler reports each start and stop on the process's standard error."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes allocated at the peak of a step beyond what was allocated before it, by torch.

    What a library takes from the system by itself (MKL's packing buffers) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = step()  # its results count
    del kept
    results = profile.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        now += change
        peak = max(peak, now)
    return peak


def count_launches(step: Step) -> int | None:
    """Kernels and copies that a step runs on the CUDA device; None where they cannot be traced."""
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with _quiet(), torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
    except RuntimeError:
        return None
    on_device = torch.autograd.DeviceType.CUDA
    count = sum(1 for event in profile.events() if event.device_type == on_device)
    return count or None


# What torch calls its products of matrices and its convolutions, forward and backward.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::convolution", "aten::conv")


def _functions() -> dict[str, str]:
    """This library's autograd functions, forward and backward, by the profiler's name for them, and
    the op that each is of.
    """
    found: dict[str, str] = {}
    for function in torch.autograd.Function.__subclasses__():
        package, _, rest = function.__module__.partition(".")
        if package == "vicreg_kernels":
            op = rest.split(".")[0]
            found |= {function.__name__: op, f"{function.__name__}Backward": op}
    return found


def _part(name: str, functions: dict[str, str]) -> str | None:
    """The part of a step that an event of this name belongs to; None: to none told apart."""
    space, found, op = name.partition("::")
    if found and space.startswith("vicreg_kernels"):
        return op.split("_")[0]
    if name.startswith(PRODUCTS):
        return "torch: linear layers and convolution"
    if "scaled_dot_product" in name:
        return "torch: attention"
    return functions.get(name)


def shares(step: Step, device: torch.device) -> dict[str, float]:
    """Fractions of a step's time: this library's ops, torch's products and attention, and `rest`.
    Of the host's time on the CPU, of the kernels' on a CUDA device; what runs within an op is its.
    """
    step()
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * cuda
    if cuda:
        torch.cuda.synchronize()
    with _quiet(), torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("whole step"):
            step()
        if cuda:
            torch.cuda.synchronize()
    on_host = torch.autograd.DeviceType.CPU
    events = profile.events()
    if cuda:
        whole = sum(e.self_device_time_total for e in events if e.device_type == on_host)
    else:
        (whole,) = (e.cpu_time_total for e in events if e.name == "whole step")
    took: dict[str, float] = {}
    functions = _functions()
    for event in events:
        part = _part(event.name, functions) if event.device_type == on_host else None
        above = event.cpu_parent
        while part is not None and above is not None:
            part = None if _part(above.name, functions) else part
            above = above.cpu_parent
        if part is not None:
            time = event.device_time_total if cuda else event.cpu_time_total
            took[part] = took.get(part, 0.0) + time
    found = {name: time / whole for name, time in sorted(took.items())} if whole else {}
    return found | {"rest": max(1 - sum(found.values()), 0.0)} if found else {}


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """GB/s of a large copy, bytes read and written, and TFLOP/s of a large matrix product."""
    cuda = device.type == "cuda"
    copied = (1 << 31) if cuda else (1 << 27)
    edge = 8192 if cuda else 2048
    clock = make_clock(device)

    def best(step: Step) -> float:
        step()
        return min(clock(step) for _ in range(7)) / 1e3

    source = torch.ones(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = 2 * copied / best(lambda: target.copy_(source)) / 1e9

    def product(edge: int) -> Step:
        a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    # a smaller product of a type that the processor does not have: one takes minutes
    while not cuda and edge > 256 and clock(product(edge // 8)) > TURN * 1e3:
        edge //= 2
    return {"copy_gbps": copy, "matmul_tflops": 2 * edge**3 / best(product(edge)) / 1e12}
