"""The program behind `vicreg-kernels bench --tune`: what is fastest on this GPU.

It measures the launch configurations of Triton kernels, and the size from which on `triton` is
faster than `cuda`, and writes vicreg_kernels/configs/<device>.json, which says what it holds.

What is tried stands in bench/tune_tables.py. A row's fields are tuned one after another, each over
its list with the others at their best so far; the steps of a list are interleaved as CUDA graphs,
so that the host's share does not hide the difference. The file is written after every row and every
shape of a threshold, so a run that is cut short has kept what it measured; a later one adds to it.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import environment, groups, measure
from bench.measure import Step
from bench.tune_tables import TABLES, THRESHOLDS, Problem, Side, Table
from vicreg_kernels import configs
from vicreg_kernels.core import dispatch

# Milliseconds of each step, all of them measured together.
Timer = Callable[[dict[str, Step]], dict[str, float]]

# How much faster a candidate must be to take the place of the one before it, and triton to run.
LEAST_GAIN = 1.02
PARTS = ("rows", "thresholds")


def device_timer(device: torch.device, seconds: float) -> Timer:
    """Medians of interleaved replays of the steps as CUDA graphs, in about `seconds`."""

    def times(steps: dict[str, Step]) -> dict[str, float]:
        clock = measure.make_clock(device)
        replays = {name: measure.capture(step) or step for name, step in steps.items()}
        estimates = {name: clock(step) / 1e3 for name, step in replays.items()}
        samples = measure.interleave(replays, clock, seconds, estimates)
        return {
            name: statistics.median(s for s in each if s is not None)
            for name, each in samples.items()
        }

    return times


@contextmanager
def configured(table: Table, config: Any) -> Iterator[Callable[[], None]]:
    """The table's kernels are launched with config; the function given checks that they asked."""
    shipped = {name: getattr(table.module, name) for name in table.lookups}
    asked = []

    def given(*key: Any) -> Any:
        asked.append(key)
        return config

    def check() -> None:
        if not asked:
            names = " or ".join(f"{table.module.__name__}.{name}" for name in table.lookups)
            raise RuntimeError(f"the kernels were launched without asking {names}")

    for name in shipped:
        setattr(table.module, name, given)
    try:
        yield check
    finally:
        for name, function in shipped.items():
            setattr(table.module, name, function)


def step_with(table: Table, config: Any, step: Step) -> Step:
    def run() -> Any:
        with configured(table, config) as check:
            result = step()
            check()
        return result

    return run


@dataclass(frozen=True)
class Tuned:
    """ms: of the configuration chosen; general_ms: of the general table's. skipped: candidate ->
    why it could not be measured.
    """

    config: Any
    ms: float
    general_ms: float
    skipped: dict[str, str]


def tune(table: Table, problem: Problem, step: Step, shared: int, timer: Timer) -> Tuned:
    """The best configuration of one row. shared: bytes of shared memory a block may take.

    Raises RuntimeError where the general configuration itself does not run.
    """
    best = general = problem.general
    step_with(table, general, step)()
    skipped: dict[str, str] = {}
    for field, values in table.candidates[problem.format].items():
        if not table.used(problem, field):
            continue
        trials = {"as before": best}
        for value in values:
            name = f"{field} {value}"
            need = table.shared(problem, field, value)
            if value == getattr(best, field):
                continue
            if need > shared:
                skipped[name] = f"takes {need} bytes of shared memory of {shared}"
                continue
            config = replace(best, **{field: value})
            try:
                step_with(table, config, step)()
            except Exception as error:  # it does not compile, or its launch does not fit
                skipped[name] = groups.reason_of(error)
                groups.check_alive(torch.device(problem.device), error)
                continue
            trials[name] = config
        if len(trials) > 1:
            times = timer({name: step_with(table, c, step) for name, c in trials.items()})
            fastest = min(times, key=times.__getitem__)
            if times["as before"] >= LEAST_GAIN * times[fastest]:
                best = trials[fastest]
    last = {"general": step_with(table, general, step), "best": step_with(table, best, step)}
    times = timer(last)
    if times["best"] > times["general"]:
        best, times["best"] = general, times["general"]
    return Tuned(best, times["best"], times["general"], skipped)


def add_row(record: dict[str, Any], op: str, problem: Problem, tuned: Tuned) -> None:
    """In the place of an earlier row of the same shape."""
    key = {"format": problem.format, **problem.key}
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(tuned.config).items()}
    times = {"ms": round(tuned.ms, 5), "general_ms": round(tuned.general_ms, 5)}
    rows = record["rows"].setdefault(op, [])
    rows[:] = [row for row in rows if any(row.get(k) != v for k, v in key.items())]
    rows.append({**key, **fields, **times})


def add_side(record: dict[str, Any], op: str, side: Side, times: dict[str, float]) -> None:
    """And the threshold that all of the op's sides of this format give by now."""
    key = {"op": op, "format": side.format, "shape": list(side.shape)}
    sides = record["sides"]
    sides[:] = [s for s in sides if any(s.get(k) != v for k, v in key.items())]
    sides.append({**key, **{f"{name}_ms": round(ms, 5) for name, ms in times.items()}})
    kin = [s for s in sides if (s["op"], s["format"]) == (op, side.format)]
    record["triton_from"].setdefault(op, {})[side.format] = threshold(kin)


def threshold(sides: list[dict[str, Any]]) -> int | None:
    """The least min(N, D) from which triton is the faster at every shape; None: from none on."""
    least = None
    for edge in sorted({min(s["shape"]) for s in sides}, reverse=True):
        same = [s for s in sides if min(s["shape"]) == edge]
        if any(s["triton_ms"] * LEAST_GAIN > s["cuda_ms"] for s in same):
            return least
        least = edge
    return least


class Tuner:
    """Everything that is measured into one record. say: where a line of the report goes."""

    def __init__(
        self,
        device: str,
        record: dict[str, Any],
        path: Path,
        shared: int,
        timer: Timer,
        deadline: float | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """device: where tensors are, "cuda". deadline: of time.perf_counter."""
        self.device, self.record, self.path = device, record, path
        self.shared, self.timer, self.deadline, self.say = shared, timer, deadline, say
        self.failed = False

    def _late(self) -> bool:
        return self.deadline is not None and time.perf_counter() > self.deadline

    def rows(self, op: str, table: Table) -> None:
        for problem in table.problems(self.device):
            if self._late():
                self.say(f"{op}: no time left for {problem}")
                continue
            try:
                tuned = tune(table, problem, problem.build(), self.shared, self.timer)
            except groups.Poisoned:
                raise
            except Exception as error:  # the next row may do
                self.failed = True
                self.say(f"{op} {problem}: failed: {groups.reason_of(error)}")
                continue
            add_row(self.record, op, problem, tuned)
            configs.write(self.path, self.record)
            gain = tuned.general_ms / tuned.ms
            self.say(f"{op} {problem}: {tuned.ms:.4g} ms, {gain:.2f}x the general one's speed")
            for name, why in tuned.skipped.items():
                self.say(f"  left out {name}: {why}")

    def thresholds(self, op: str, sides: Callable[[str], list[Side]]) -> None:
        for side in sides(self.device):
            if self._late():
                self.say(f"{op}: no time left for {side}")
                continue
            try:
                steps = side.build()
                for step in steps.values():
                    step()
                times = self.timer(steps)
            except Exception as error:
                groups.check_alive(torch.device(self.device), error)
                self.failed = True
                self.say(f"{op} {side}: failed: {groups.reason_of(error)}")
                continue
            add_side(self.record, op, side, times)
            configs.write(self.path, self.record)
            shown = ", ".join(f"{name} {ms:.4g} ms" for name, ms in times.items())
            self.say(f"{op} {side}: {shown}")


def shared_memory(device: torch.device) -> int:
    """Bytes that a block may ask for."""
    import triton

    index = device.index or torch.cuda.current_device()
    utils = triton.runtime.driver.active.utils
    return int(utils.get_device_properties(index)["max_shared_mem"])


def start(name: str, path: Path) -> dict[str, Any]:
    """The record to add to: the file's, or an empty one where there is none or it is not valid."""
    if path.exists():
        try:
            return configs.read(path)
        except ValueError as error:
            print(error, file=sys.stderr)
    return configs.empty(name)


def parse(argv: list[str]) -> argparse.Namespace:
    def listed(known: tuple[str, ...]) -> Callable[[str], list[str]]:
        def parsed(text: str) -> list[str]:
            for name in text.split(","):
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
            return text.split(",")

        return parsed

    parser = argparse.ArgumentParser(prog="vicreg-kernels bench --tune", description=__doc__)
    ops = tuple(dict.fromkeys([*TABLES, *THRESHOLDS]))
    parser.add_argument("--op", type=listed(ops), default=list(ops), help=f"of {','.join(ops)}")
    parser.add_argument(
        "--part", type=listed(PARTS), default=list(PARTS), help=f"of {','.join(PARTS)}"
    )
    parser.add_argument("--seconds", type=float, help="start nothing new after so many")
    parser.add_argument(
        "--budget", type=float, default=0.4, help="seconds of timing a list of candidates (0.4)"
    )
    parser.add_argument(
        "--output", type=Path, default=configs.FOLDER, help="the folder (default: the package's)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    begun = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if not torch.cuda.is_available():
        print("bench --tune: no CUDA device here", file=sys.stderr)
        return 2
    for backend in ("triton", "cuda") if "thresholds" in options.part else ("triton",):
        reason = dispatch.missing(backend, "cuda", torch.float32)
        if reason is not None:
            print(f"bench --tune: {backend}: {reason}", file=sys.stderr)
            return 2
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    path = options.output / configs.path_of(name).name
    record = start(name, path)
    about = environment.describe(device)
    record["measured"] = {
        "date": about["date"],
        "commit": about["commit"],
        "command": shlex.join(["vicreg-kernels", "bench", "--tune", *argv]),
        "versions": about["versions"],
    }
    tuner = Tuner(
        "cuda",
        record,
        path,
        shared_memory(device),
        device_timer(device, options.budget),
        deadline=begun + options.seconds if options.seconds else None,
        say=lambda line: print(line, flush=True),
    )
    try:
        for op in options.op:
            if "rows" in options.part and op in TABLES:
                tuner.rows(op, TABLES[op])
            if "thresholds" in options.part and op in THRESHOLDS:
                tuner.thresholds(op, THRESHOLDS[op])
    except groups.Poisoned as error:
        print(f"bench --tune: lost the device: {error}; run it again", file=sys.stderr)
        return 1
    for op, threshold in record["triton_from"].items():
        print(f"{op}: triton from min(N, D) = {threshold}")
    if path.exists():
        print(f"wrote {path}")
    return 1 if tuner.failed else 0


if __name__ == "__main__":
    sys.exit(main())
