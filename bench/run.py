"""The program behind `make bench`: every op against its baselines, interleaved, in one process.

Prints tables and writes bench/results/<device>/<op>.json (README.md there has the schema). A run
that measures a selection of cases prints only, unless it is given --output.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench import ALL as OPS
from bench import environment, measure, report
from bench.case import Case, Plan
from vicreg_kernels import dispatch

LAUNCH_MS = 0.005
# Seconds of budget a case, shared by its contenders.
BUDGET = {"cpu": 5.0, "cuda": 4.0}
QUICK_BUDGET = 2.0
DTYPES = ("float32", "bfloat16", "float16")


VERY_SLOW = 5.0  # seconds a call


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


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def measure_case(
    case: Case,
    plan: Plan,
    wanted: Iterable[str],
    device: torch.device,
    dtype: str,
    budget: float,
    limits: dict[str, float],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Its rows, one a contender, and why others have none. limits: the ceilings for dtype."""
    cuda = device.type == "cuda"
    steps, estimates, peaks, reasons = {}, {}, {}, {}
    for name in wanted:
        step = plan.steps[name]
        try:
            estimates[name], peaks[name] = warm_up(step, cuda or name in plan.compiled, device)
            steps[name] = step
        except Exception as error:  # one that fails here does not stop the others
            if name == "ours":
                traceback.print_exc()
            reasons[name] = reason_of(error)
    clock = (measure.HostClock if plan.host else measure.make_clock)(device)
    samples = measure.interleave(steps, clock, budget, estimates)
    replays = {}
    if cuda:
        found = {n: measure.capture(s) for n, s in steps.items() if n not in plan.peers}
        captured = {n: s for n, s in found.items() if s is not None}
        replays = measure.interleave(captured, clock, budget / 2, estimates)
    targets: dict[str, float | None] = {"ours": case.floor if cuda else None}
    targets |= case.targets.get(device.type, {})
    if dtype not in case.dtypes.get(device.type, ()):
        targets = {}
    bytes_ms = plan.least_bytes / limits["copy_gbps"] / 1e6
    operations_ms = plan.least_operations / limits["matmul_tflops"] / 1e9
    rows = []
    for name, step in steps.items():
        ours = name == "ours"
        times = spread(samples[name])
        launches = measure.count_launches(step) if ours and cuda else None
        floor = max(bytes_ms, operations_ms) + LAUNCH_MS * (launches or 0)
        row = {
            "case": case.name,
            "dtype": dtype,
            "contender": name,
            "backend": plan.backend if ours else None,
            "target": targets.get(name),
            "most_ms": case.most_ms if ours else None,
            "rounds": sum(s is not None for s in samples[name]),
            "ms": asdict(times),
            "ratio": ratio(samples, name),
            "graph_ms": asdict(spread(replays[name])) if name in replays else None,
            "graph_ratio": ratio(replays, name),
            "peak_mib": None if plan.elsewhere else round(peaks[name] / 2**20, 3),
            "gbps": plan.least_bytes / times.p50 / 1e6,
            "tflops": plan.least_operations / times.p50 / 1e9,
            "bound": "bytes" if bytes_ms >= operations_ms else "operations",
            "percent_of_ceiling": 100 * max(bytes_ms, operations_ms) / times.p50,
            "launches": launches,
            "floor_ms": floor,
            "percent_of_floor": 100 * floor / times.p50,
        }
        rows.append(row)
    return rows, reasons


def spread(samples: list[float | None]) -> measure.Spread:
    return measure.Spread.of([s for s in samples if s is not None])


def ratio(samples: dict[str, list[float | None]], name: str) -> float | None:
    """Of a contender's time to ours; None for ours, and where one of the two was not measured."""
    if name == "ours" or not {name, "ours"} <= samples.keys():
        return None
    return measure.ratio(samples[name], samples["ours"])


def contenders(plan: Plan, case: Case, device: str, options: argparse.Namespace) -> list[str]:
    """Those of the plan that this run measures."""
    if options.contenders:
        return [name for name in plan.steps if name in options.contenders]
    costly = set()
    if options.lean and case.name not in options.first:
        costly = {*plan.compiled, *plan.peers} - case.targets.get(device, {}).keys()
    return [name for name in plan.steps if name not in costly]


def attempt(
    case: Case,
    dtype: str,
    device: torch.device,
    options: argparse.Namespace,
    limits: dict[str, float],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """measure_case of what the options select; a case that fails is said and stops nothing."""
    torch.manual_seed(0)
    try:
        plan = case.build(device, getattr(torch, dtype), options.backend)
        unknown = (plan.steps.keys() | plan.skipped.keys()) - options.known.keys()
        if unknown:
            raise ValueError(f"{case.name}: {', '.join(sorted(unknown))} not in CONTENDERS")
        wanted = contenders(plan, case, device.type, options)
        rows, reasons = measure_case(case, plan, wanted, device, dtype, options.budget, limits)
    except Exception as error:
        traceback.print_exc()
        return [], {"ours": reason_of(error)}
    if plan.compiled:
        torch.compiler.reset()
    named = options.contenders or plan.skipped
    return rows, reasons | {name: why for name, why in plan.skipped.items() if name in named}


def parse(argv: list[str] | None) -> argparse.Namespace:
    def listed(known: Iterable[str]) -> Any:
        def parsed(text: str) -> list[str]:
            names = text.split(",")
            for name in names:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
            return names

        return parsed

    parser = argparse.ArgumentParser(prog="python3 -m bench.run", description=__doc__)
    parser.add_argument("--op", type=listed(OPS), help=f"of {','.join(OPS)}; default: all")
    parser.add_argument("--cases", help="names of cases, of any of the ops")
    parser.add_argument("--quick", action="store_true", help="a few cases, lean, fewer rounds")
    parser.add_argument(
        "--lean",
        action="store_true",
        help="compiled contenders and peers only at the first case and where they have a target",
    )
    parser.add_argument("--dtype", type=listed(DTYPES), help="in place of each case's own")
    parser.add_argument("--contenders", help="names of contenders, of any of the ops")
    parser.add_argument("--backend", choices=dispatch.BACKENDS, help="of ours")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--budget", type=float, help="seconds a case, besides warm-up")
    parser.add_argument("--seconds", type=float, help="start no case after so many, in all")
    parser.add_argument("--output", type=Path, help="the folder for <op>.json")
    parser.add_argument("--append", action="store_true", help="add this run to the file's runs")
    parser.add_argument(
        "--missing", action="store_true", help="append what the file's runs do not hold"
    )
    options = parser.parse_args(argv)
    options.modules = {op: import_module(f"bench.{op}") for op in options.op or OPS}
    modules = options.modules.values()
    options.first = [next(iter(module.CASES)) for module in modules]
    options.known = {name: None for m in modules for name in ("ours", *m.CONTENDERS)}
    cases = {name: None for m in modules for name in m.CASES}
    for option, known in (("cases", cases), ("contenders", options.known)):
        text = getattr(options, option)
        try:
            setattr(options, option, listed(known)(text) if text else None)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --{option}: {error}")
    return options


def read(path: Path | None) -> list[dict[str, Any]]:
    """The runs of a record; none where there is no file."""
    return json.loads(path.read_text())["runs"] if path is not None and path.exists() else []


def write(path: Path, record: dict[str, Any]) -> None:
    """Through a second file, so that a run that is killed leaves the last complete state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(".partial")
    partial_file.write_text(json.dumps(record, indent=1) + "\n")
    partial_file.replace(path)


def select(
    module: Any, options: argparse.Namespace, device: str, earlier: list[dict[str, Any]]
) -> list[tuple[Case, str]]:
    """The cases and dtypes of an op to measure, most important first."""
    held = {(row["case"], row["dtype"]) for run in earlier for row in run["rows"]}
    pairs = []
    for case in module.CASES.values():
        if options.cases:
            chosen = case.name in options.cases
        else:
            chosen = device in case.dtypes and (case.quick or not options.quick)
        if chosen:
            dtypes = options.dtype or case.dtypes.get(device, ("float32",))
            pairs += [(case, dtype) for dtype in dtypes]
    return [p for p in pairs if not (options.missing and (p[0].name, p[1]) in held)]


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    options = parse(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench: no CUDA device here", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    options.lean |= options.quick
    options.budget = options.budget or (QUICK_BUDGET if options.quick else BUDGET[device.type])
    selected = ("lean", "cases", "dtype", "contenders", "backend", "seconds")
    if options.output is None and not any(getattr(options, name) for name in selected):
        options.output = environment.default_folder(device)
    command = shlex.join(["python3", "-m", "bench.run", *(sys.argv[1:] if argv is None else argv)])
    about = {"command": command, **environment.describe(device)}
    limits: dict[str, dict[str, float]] = {}
    failed = False
    for op, module in options.modules.items():
        path = options.output / f"{op}.json" if options.output else None
        earlier = read(path) if options.append or options.missing else []
        pairs = select(module, options, device.type, earlier)
        if not pairs:
            print(f"{op}: nothing to measure")
            continue
        run: dict[str, Any] = {**about, "ceilings": {}, "rows": [], "skipped": []}
        record = {"schema": report.SCHEMA, "op": op, "title": module.TITLE}
        record |= {"contenders": module.CONTENDERS, "runs": [*earlier, run]}
        named = options.contenders or module.CONTENDERS
        columns = report.Columns(
            max(len(case.name) for case, _ in pairs), [n for n in module.CONTENDERS if n in named]
        )
        print(report.header(record, run), flush=True)
        begun, late = time.perf_counter(), []
        for case, dtype in pairs:
            if options.seconds and time.perf_counter() - start > options.seconds:
                late.append(f"{case.name} {dtype}")
                continue
            if dtype not in limits:
                limits[dtype] = measure.ceilings(device, getattr(torch, dtype))
            if dtype not in run["ceilings"]:
                run["ceilings"][dtype] = limits[dtype]
                print(f"\n{report.ceilings_of(run, dtype)}\n{columns.headings()}", flush=True)
            rows, reasons = attempt(case, dtype, device, options, limits[dtype])
            failed |= "ours" in reasons
            run["rows"] += rows
            run["skipped"] += [
                {"case": case.name, "dtype": dtype, "contender": name, "reason": why}
                for name, why in reasons.items()
            ]
            run["seconds"] = round(time.perf_counter() - begun, 1)
            print(columns.lines_of(rows), end="", flush=True)
            if path is not None:
                write(path, record)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        print("\n".join(["", *report.remarks(run)]))
        if late:
            print(f"no time left for: {', '.join(late)}")
        if path is not None and path.exists():
            print(f"wrote {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
