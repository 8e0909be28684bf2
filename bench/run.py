"""The program behind `make bench`: the VICReg op, forward and backward, against its baselines.

Prints a table and writes bench/results/<device>/vicreg.json (README.md there has the schema). A run
that measures a selection prints only, unless it is given --output.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import environment, measure, report
from bench.baselines import BASELINES, COMPILED, PEERS, Loss
from bench.cases import CASES, QUICK, Case
from vicreg_kernels import dispatch, variance_covariance, vicreg_loss

SCHEMA = "vicreg-kernels/bench/1"
LAUNCH_MS = 0.005
# Contenders that a quick run leaves out: slow to compile or slow to run.
QUICK_CONTENDERS = ("ours", "eager", "gram_plain", "gram_best")
# Seconds of budget a case, shared by its contenders.
BUDGET = {"cpu": 5.0, "cuda": 4.0}
QUICK_BUDGET = 2.0


def ours(x: Tensor, y: Tensor, backend: str | None = None) -> Tensor:
    """The loss of `baselines.eager`, through the public functions."""
    if x.dim() == 2:
        return vicreg_loss(x, y, backend=backend)
    losses = []
    for view in (x, y):
        variance, covariance = variance_covariance(view, backend=backend)
        losses.append(25 * variance + covariance)
    return losses[0] + losses[1]


def views(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two correlated views with standard deviations about the margin."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator) * 0.9
    y = x + 0.4 * torch.randn(case.shape, generator=generator)
    return tuple(z.to(device=device, dtype=dtype).requires_grad_() for z in (x, y))  # type: ignore[return-value]


def left_out(name: str, case: Case, device: torch.device) -> str | None:
    """Why a run that names no contenders leaves this one out; None: it does not."""
    if device.type == "cpu" and name == "gram_compiled":
        return "on the CPU gram_best is the faster one"
    if device.type == "cpu" and name in PEERS and case.dim == 8192 and case.rows != 256:
        return "its D x D products at D = 8192 take over 10 s whatever N is: see 256x8192"
    return None


def build(
    names: list[str], case: Case, backend: str | None
) -> tuple[dict[str, Loss], dict[str, str]]:
    """The contenders of a case, and why others are left out."""
    losses: dict[str, Loss] = {}
    skipped: dict[str, str] = {}
    for name in names:
        if name == "ours":
            losses[name] = partial(ours, backend=backend)
        elif name in PEERS and case.groups:
            skipped[name] = "has no loss over groups without the invariance"
        else:
            try:
                losses[name] = BASELINES[name]()
            except ImportError as error:
                skipped[name] = str(error)
    return losses, skipped


def warm_up(name: str, step: measure.Step, device: torch.device) -> tuple[float, int]:
    """Seconds a call, and bytes at its peak. A slow step is called once, one that compiles first
    (torch.compile, Triton) twice.
    """
    if name in COMPILED or device.type == "cuda":
        step()
    start = time.perf_counter()
    peak = measure.peak_memory(step, device)
    seconds = time.perf_counter() - start
    if seconds < measure.SLOW:
        seconds = measure.make_clock(device)(step) / 1e3
        peak = measure.peak_memory(step, device)
    return seconds, peak


def measure_case(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    names: list[str],
    backend: str | None,
    budget: float,
    limits: dict[str, float],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Its rows, one a contender, and what was skipped. limits: the ceilings for dtype."""
    x, y = views(case, device, dtype)
    losses, reasons = build(names, case, backend)
    steps, estimates, peaks = {}, {}, {}
    for name, loss in losses.items():
        step = measure.make_step(loss, x, y)
        try:
            estimates[name], peaks[name] = warm_up(name, step, device)
        except (RuntimeError, NotImplementedError) as error:
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            steps[name] = step
    clock = measure.make_clock(device)
    # A slow peer's ratio to a slow published formula needs no second round.
    least = {name: 1 for name in PEERS}
    samples = measure.interleave(steps, clock, budget, estimates, least)
    replays = {}
    if device.type == "cuda":
        found = {n: measure.capture(s) for n, s in steps.items() if n not in PEERS}
        captured = {n: s for n, s in found.items() if s is not None}
        replays = measure.interleave(captured, clock, budget / 2, estimates)
    label = {"shape": case.name, "dtype": str(dtype).removeprefix("torch.")}
    moved, done = case.least_bytes(x.element_size()), case.least_operations()
    bytes_ms = moved / limits["copy_gbps"] / 1e6
    operations_ms = done / limits["matmul_tflops"] / 1e9
    rows = []
    for name, step in steps.items():
        times = measure.Spread.of([s for s in samples[name] if s is not None])
        row: dict[str, Any] = {**label, "contender": name, "backend": None}
        if name == "ours":
            side = min(case.rows, case.dim)
            row["backend"] = dispatch.choose("vicreg", backend, device.type, dtype, side)
        launches = None
        if name == "ours" and device.type == "cuda":
            launches = measure.count_launches(step)
        floor = max(bytes_ms, operations_ms) + LAUNCH_MS * (launches or 0)
        row |= {
            "rounds": sum(s is not None for s in samples[name]),
            "ms": asdict(times),
            "ratio": None if name == "ours" else _ratio(samples, name),
            "graph_ms": None,
            "graph_ratio": None,
            "peak_mib": round(peaks[name] / 2**20, 3),
            "gbps": moved / times.p50 / 1e6,
            "tflops": done / times.p50 / 1e9,
            "bound": "bytes" if bytes_ms >= operations_ms else "operations",
            "percent_of_ceiling": 100 * max(bytes_ms, operations_ms) / times.p50,
            "launches": launches,
            "floor_ms": floor,
            "percent_of_floor": 100 * floor / times.p50,
        }
        if name in replays:
            row["graph_ms"] = asdict(measure.Spread.of([s for s in replays[name] if s is not None]))
            row["graph_ratio"] = None if name == "ours" else _ratio(replays, name)
        rows.append(row)
    return rows, [{**label, "contender": n, "reason": why} for n, why in reasons.items()]


def _ratio(samples: dict[str, list[float | None]], name: str) -> float | None:
    return measure.ratio(samples[name], samples["ours"]) if "ours" in samples else None


def parse(argv: list[str] | None) -> argparse.Namespace:
    def listed(known: Any) -> Any:
        def parsed(text: str) -> list[str]:
            names = text.split(",")
            for name in names:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
            return names

        return parsed

    dtypes = ("float32", "bfloat16", "float16")
    parser = argparse.ArgumentParser(prog="python3 -m bench.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, contenders and rounds")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--shapes", type=listed(CASES), help=f"of {','.join(CASES)}")
    parser.add_argument(
        "--dtype", type=listed(dtypes), help="default: float32; on cuda bfloat16 too"
    )
    parser.add_argument("--contenders", type=listed(("ours", *BASELINES)))
    parser.add_argument("--backend", choices=dispatch.BACKENDS, help="of ours")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--budget", type=float, help="seconds a shape, besides warm-up")
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument("--append", action="store_true", help="add this run to the file's runs")
    return parser.parse_args(argv)


def write(path: Path, run: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
    """Through a second file, so that a run that is killed leaves the last complete state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema": SCHEMA, "op": "vicreg", "runs": [*earlier, run]}, indent=1)
    partial_file = path.with_suffix(".partial")
    partial_file.write_text(text + "\n")
    partial_file.replace(path)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench: no CUDA device here", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = [CASES[name] for name in options.shapes or (QUICK if options.quick else CASES)]
    if options.shapes is None:
        cases = [case for case in cases if device.type == "cuda" or not case.gpu_only]
    names = options.contenders or (QUICK_CONTENDERS if options.quick else ("ours", *BASELINES))
    dtypes = options.dtype or (["float32", "bfloat16"] if device.type == "cuda" else ["float32"])
    budget = options.budget or (QUICK_BUDGET if options.quick else BUDGET[device.type])
    selected = any((options.quick, options.shapes, options.dtype, options.contenders))
    output = options.output
    if output is None and not (selected or options.backend):
        output = environment.default_folder(device) / "vicreg.json"
    earlier = []
    if options.append and output is not None and output.exists():
        earlier = json.loads(output.read_text())["runs"]
    command = shlex.join(["python3", "-m", "bench.run", *(sys.argv[1:] if argv is None else argv)])
    run: dict[str, Any] = {"command": command, **environment.describe(device)}
    run |= {"ceilings": {}, "rows": [], "skipped": []}
    start = time.perf_counter()
    for dtype_name in dtypes:
        dtype = getattr(torch, dtype_name)
        limits = run["ceilings"][dtype_name] = measure.ceilings(device, dtype)
        print(report.header(run, dtype_name), flush=True)
        for case in cases:
            reasons = {n: left_out(n, case, device) for n in names if not options.contenders}
            absent = {name: why for name, why in reasons.items() if why is not None}
            wanted = [name for name in names if name not in absent]
            rows, skipped = measure_case(
                case, device, dtype, list(wanted), options.backend, budget, limits
            )
            skipped += [
                {"shape": case.name, "dtype": dtype_name, "contender": name, "reason": why}
                for name, why in absent.items()
            ]
            run["rows"] += rows
            run["skipped"] += skipped
            run["seconds"] = round(time.perf_counter() - start, 1)
            print(report.lines_of(rows, device.type), flush=True)
            if output is not None:
                write(output, run, earlier)
    print("\n".join(report.remarks(run)))
    if output is not None:
        print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
