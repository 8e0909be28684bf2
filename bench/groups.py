"""Measures one case: ours and plain PyTorch as one group, then each other contender beside ours.

A group's members are warmed up and then interleaved; its rows are handed on as soon as they are
timed, before anything else of the case runs. So whatever a torch.compile or Triton's compiler takes
minutes for, and whatever a contender breaks, what was measured before it is kept. The order: plain
PyTorch, ours on other backends, what torch.compile builds, other packages.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from bench import measure
from bench.case import Case, Plan
from vicreg_kernels.core import dispatch

LAUNCH_MS = 0.005
VERY_SLOW = 5.0  # seconds a call

# Ours on a backend that `dispatch.choose` does not choose for the case, and what the tables say.
OURS = {"ours_cuda": "ours, CUDA C++", "ours_triton": "ours, Triton", "ours_cpu": "ours, CPU C++"}

Rows = list[dict[str, Any]]


class Poisoned(RuntimeError):
    """A contender left the CUDA device in an error that only a new process gets rid of."""


def every_backend(device: torch.device) -> list[str]:
    """Names of OURS that are measured by default: on a GPU both of its backends, on a CPU none,
    since there Triton only has its interpreter.
    """
    return ["ours_cuda", "ours_triton"] if device.type == "cuda" else []


def with_backends(
    case: Case, plan: Plan, names: Iterable[str], device: torch.device, dtype: torch.dtype
) -> Plan:
    """The plan with a step of ours for each backend of names that is not the plan's own: that of a
    plan built for it, on inputs drawn from the same seed.
    """
    steps, skipped = {}, dict(plan.skipped)
    for name in names:
        backend = name.removeprefix("ours_")
        if backend == plan.backend:
            continue
        reason = dispatch.missing(backend, device.type, dtype)
        if reason is None:
            torch.manual_seed(0)
            try:
                steps[name] = case.build(device, dtype, backend).steps["ours"]
            except Exception as error:  # the op cannot run there, or what it needs does not compile
                reason = reason_of(error)
                check_alive(device, error)
        if reason is not None:
            skipped[name] = reason
    every = {name: step for name, step in plan.steps.items() if name == "ours"} | steps
    return replace(plan, steps=every | plan.steps, skipped=skipped)


def warm_up(step: measure.Step, twice: bool, device: torch.device) -> tuple[float, int]:
    """Seconds a call, and bytes at its peak. A very slow step is called once, others again: the
    first call of a process also starts the profiler and loads libraries. twice: one that compiles
    in its first call (torch.compile, Triton).
    """
    if twice:
        step()
    start = time.perf_counter()
    peak = measure.peak_memory(step, device)
    seconds = time.perf_counter() - start
    if seconds < VERY_SLOW:
        seconds = measure.make_clock(device)(step) / 1e3
        peak = measure.peak_memory(step, device)
    return seconds, peak


def reason_of(error: BaseException) -> str:
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0]


def is_ours(name: str) -> bool:
    return name == "ours" or name in OURS


def check_alive(device: torch.device, error: BaseException) -> None:
    """Raise Poisoned where the device answers no more after `error`."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise Poisoned(reason_of(error)) from error


class Measurement:
    """One case on one device and dtype. rows: one a contender; reasons: why others have none;
    late: those for which there was no time.
    """

    def __init__(
        self, case: Case, plan: Plan, device: torch.device, dtype: str, limits: dict[str, float]
    ) -> None:
        """limits: the ceilings of the device for dtype."""
        self.case, self.plan, self.device = case, plan, device
        self.dtype, self.limits = dtype, limits
        self.cuda = device.type == "cuda"
        self.rows: Rows = []
        self.reasons: dict[str, str] = {}
        self.late: list[str] = []
        self._estimates: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._replays: dict[str, measure.Step | None] = {}

    def run(
        self, wanted: Iterable[str], budget: float, deadline: float | None = None
    ) -> Iterator[None]:
        """Measure the contenders in `budget` seconds besides warm-up. Yields whenever rows or
        reasons are new. No group but the first starts after the deadline, of time.perf_counter.

        Raises Poisoned, after which no contender can be measured in this process.
        """
        names = list(wanted)
        alone = [
            name
            for kind in (OURS, self.plan.compiled, self.plan.peers)
            for name in names
            if name in kind
        ]
        first = [name for name in names if name not in alone]
        groups = [group for group in (first, *([name] for name in alone)) if group]
        # Ours is beside each.
        shares = [len({"ours", *group} & set(names)) for group in groups]
        for i, (group, share) in enumerate(zip(groups, shares, strict=True)):
            if i and deadline is not None and time.perf_counter() > deadline:
                self.late = [name for later in groups[i:] for name in later]
                return
            yield from self._group(group, budget * share / sum(shares))

    def _group(self, group: list[str], budget: float) -> Iterator[None]:
        for name in group:
            try:
                twice = self.cuda or name in self.plan.compiled
                step = self.plan.steps[name]
                self._estimates[name], self._peaks[name] = warm_up(step, twice, self.device)
            except Exception as error:  # one that fails here does not stop the others
                self._failed([name], error)
        ready = ["ours"] * ("ours" in self._estimates and "ours" not in group)
        ready += [name for name in group if name in self._estimates]
        steps = {name: self.plan.steps[name] for name in ready}
        try:
            samples = self._interleave(steps, budget)
        except Exception as error:
            self._failed([name for name in group if name in steps], error)
            yield
            return
        new = [self._row(name, samples) for name in group if name in steps]
        self.rows += new
        yield
        if self.plan.shares:
            for row in new:
                if row["contender"] not in (*self.plan.compiled, *self.plan.peers):
                    row["shares"] = measure.shares(steps[row["contender"]], self.device)
            yield
        if self.cuda and new:
            try:
                self._trace(new, steps, budget / 2)
            except Exception as error:  # the row stays, without them
                traceback.print_exc()
                check_alive(self.device, error)
            yield

    def _failed(self, names: list[str], error: Exception) -> None:
        if any(map(is_ours, names)):
            traceback.print_exc()
        self.reasons |= dict.fromkeys(names, reason_of(error))
        check_alive(self.device, error)

    def _trace(self, new: Rows, steps: dict[str, measure.Step], budget: float) -> None:
        """Launches and the replays of CUDA graphs, added to rows that are timed and kept already:
        what a profiler or a capture breaks has cost nothing.
        """
        for row in new:
            if is_ours(row["contender"]):
                row["launches"] = measure.count_launches(steps[row["contender"]])
                self._add_floor(row)
        for name, step in steps.items():
            if name not in self.plan.peers and name not in self._replays:
                self._replays[name] = measure.capture(step)
        replays = {n: r for n in steps if (r := self._replays.get(n)) is not None}
        samples = self._interleave(replays, budget)
        for row in new:
            if row["contender"] in replays:
                row["graph_ms"] = asdict(spread(samples[row["contender"]]))
                row["graph_ratio"] = ratio(samples, row["contender"])

    def _interleave(
        self, steps: dict[str, measure.Step], budget: float
    ) -> dict[str, list[float | None]]:
        clock = (measure.HostClock if self.plan.host else measure.make_clock)(self.device)
        return measure.interleave(steps, clock, budget, self._estimates)

    def _row(self, name: str, samples: dict[str, list[float | None]]) -> dict[str, Any]:
        plan, times = self.plan, spread(samples[name])
        backend = plan.backend if name == "ours" else name.removeprefix("ours_")
        row = {
            "case": self.case.name,
            "dtype": self.dtype,
            "contender": name,
            "backend": backend if is_ours(name) else None,
            "target": self._target(name),
            "most_ms": self.case.most_ms if name == "ours" else None,
            "rounds": sum(s is not None for s in samples[name]),
            "ms": asdict(times),
            "ratio": ratio(samples, name),
            "graph_ms": None,
            "graph_ratio": None,
            "peak_mib": None if plan.elsewhere else round(self._peaks[name] / 2**20, 3),
            "gbps": plan.least_bytes / times.p50 / 1e6,
            "tflops": plan.least_operations / times.p50 / 1e9,
            "launches": None,
            "shares": None,
            "error": None,
        }
        self._add_floor(row)
        return row

    def _target(self, name: str) -> float | None:
        kind = self.device.type
        if self.dtype not in self.case.dtypes.get(kind, ()):
            return None
        if name == "ours":
            return self.case.floor if self.cuda else None
        return self.case.targets.get(kind, {}).get(name)

    def _add_floor(self, row: dict[str, Any]) -> None:
        bytes_ms = self.plan.least_bytes / self.limits["copy_gbps"] / 1e6
        operations_ms = self.plan.least_operations / self.limits["matmul_tflops"] / 1e9
        floor = max(bytes_ms, operations_ms) + LAUNCH_MS * (row["launches"] or 0)
        p50 = row["ms"]["p50"]
        row["bound"] = "bytes" if bytes_ms >= operations_ms else "operations"
        row["percent_of_ceiling"] = 100 * max(bytes_ms, operations_ms) / p50
        row["floor_ms"], row["percent_of_floor"] = floor, 100 * floor / p50


def spread(samples: list[float | None]) -> measure.Spread:
    return measure.Spread.of([s for s in samples if s is not None])


def ratio(samples: dict[str, list[float | None]], name: str) -> float | None:
    """Of a contender's time to ours; None for ours, and where one of the two was not measured."""
    if name == "ours" or not {name, "ours"} <= samples.keys():
        return None
    return measure.ratio(samples[name], samples["ours"])
