"""The program behind `make bench`: every op against its baselines, interleaved, in one process.

Prints tables and writes bench/results/<device>/<op>.json (README.md there has the schema), anew as
soon as a row is measured. A run that measures a selection of cases prints only, unless it is given
--output. Where a contender breaks a GPU's context, a run with --output goes on in a new process. On
a terminal, standard error shows how far it is and how long it will take.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench import ALL as OPS
from bench import compare, environment, flat, groups, measure, progress, record, report
from bench.case import Case
from vicreg_kernels.core import dispatch

# Seconds of budget a case, shared by its contenders.
BUDGET = {"cpu": 5.0, "cuda": 4.0}
QUICK_BUDGET = 2.0
DTYPES = ("float32", "bfloat16", "float16")


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
    parser.add_argument(
        "--without-compiled",
        action="store_true",
        help="leave out the contenders that torch.compile builds",
    )
    parser.add_argument("--dtype", type=listed(DTYPES), help="in place of each case's own")
    parser.add_argument("--contenders", help="names of contenders, of any of the ops")
    parser.add_argument("--backend", choices=dispatch.BACKENDS, help="of ours")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--budget", type=float, help="seconds a case, besides warm-up")
    parser.add_argument("--seconds", type=float, help="start nothing new after so many, in all")
    parser.add_argument("--output", type=Path, help="the folder for <op>.json")
    parser.add_argument("--append", action="store_true", help="add this run to the file's runs")
    parser.add_argument(
        "--missing",
        action="store_true",
        help="append the contenders of which the file's runs hold no row and no reason",
    )
    parser.add_argument(
        "--accuracy",
        action="store_true",
        help="also the distance of our results from those of the reference in float64",
    )
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show a progress bar with the time left; default: where standard error is a terminal",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OLD",
        help="say at the end what changed beyond noise since the records of this folder or file",
    )
    # what a process that lost the device leaves to the one that goes on in its place
    parser.add_argument("--continued", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.old, options.anew = [], []
    try:
        if options.continued:
            left = json.loads(options.continued.read_text(encoding="utf-8"))
            options.old, options.anew = left["old"], left["anew"]
            options.continued.unlink()
        elif options.compare:
            options.old = compare.load_old(options.compare)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.progress is None:
        options.progress = progress.shown_by_default()
    elif options.progress and not progress.INSTALLED:
        parser.error("argument --progress: tqdm is not installed")
    options.modules = {op: import_module(f"bench.{op}") for op in options.op or OPS}
    modules = options.modules.values()
    options.first = [next(iter(module.CASES)) for module in modules]
    options.known = {name: None for m in modules for name in ("ours", *groups.OURS, *m.CONTENDERS)}
    cases = {name: None for m in modules for name in m.CASES}
    for option, known in (("cases", cases), ("contenders", options.known)):
        text = getattr(options, option)
        try:
            setattr(options, option, listed(known)(text) if text else None)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --{option}: {error}")
    return options


def select(
    module: Any, options: argparse.Namespace, device: str, earlier: record.Earlier
) -> list[tuple[Case, str]]:
    """The cases and dtypes of an op to measure, most important first."""
    pairs = []
    for case in module.CASES.values():
        if options.cases:
            chosen = case.name in options.cases
        else:
            chosen = device in case.dtypes and (case.quick or not options.quick)
        if chosen:
            dtypes = options.dtype or case.dtypes.get(device, ("float32",))
            pairs += [(case, dtype) for dtype in dtypes]
    if not options.missing:
        return pairs
    return [p for p in pairs if not earlier.complete(*p, device, options)]


def go_on(
    argv: list[str], options: argparse.Namespace, seconds: float, not_begun: list[str]
) -> None:
    """Become a new process that measures what the records lack. seconds: used up so far. not_begun:
    ops whose files are of before this run, and are written anew unless the run adds to them.
    """
    if options.continued:
        not_begun = [op for op in not_begun if op in options.anew]
    elif options.append or options.missing:
        not_begun = []
    left = {"old": options.old, "anew": not_begun}  # OLD may be the folder that is written
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(left, file)
    words = [*argv, "--missing", "--continued", file.name]
    if options.seconds:
        words += ["--seconds", str(max(options.seconds - seconds, 1e-3))]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "bench.run", *words])


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench: no CUDA device here", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    options.lean |= options.quick
    options.budget = options.budget or (QUICK_BUDGET if options.quick else BUDGET[device.type])
    selected = ("lean", "without_compiled", "cases", "dtype", "contenders", "backend", "seconds")
    if options.output is None and not any(getattr(options, name) for name in selected):
        options.output = environment.default_folder(device)
    at = argv.index("--continued") if options.continued else len(argv)
    command = shlex.join(["python3", "-m", "bench.run", *argv[:at]])
    about = {"command": command, **environment.describe(device)}
    deadline = start + options.seconds if options.seconds else None
    limits: dict[str, dict[str, float]] = {}
    ops = []
    for op, module in options.modules.items():
        path = options.output / f"{op}.json" if options.output else None
        adds = (options.append or options.missing) and op not in options.anew
        earlier = record.read(path) if adds else []
        pairs = select(module, options, device.type, record.Earlier(earlier))
        ops.append((op, module, path, earlier, pairs))
    failed, lost, measured, names = False, False, [], [*options.modules]
    with progress.Bar(sum(len(pairs) for *_, pairs in ops), options.progress) as bar:
        for op, module, path, earlier, pairs in ops:
            run = record.Run(module, op, about, earlier, path, device, options)
            # the same lists, which grow
            measured.append(run.record if options.missing else run.record | {"runs": [run.entry]})
            if not pairs:
                bar.say(f"{op}: nothing to measure")
                continue
            columns = report.Columns(max(len(case.name) for case, _ in pairs), run.columns)
            bar.say(report.header(run.record, run.entry))
            for case, dtype in pairs:
                if deadline and time.perf_counter() > deadline:
                    run.late.append(f"{case.name} {dtype}")
                    bar.done()
                    continue
                bar.begin(f"{op} {case.name} {dtype}")
                if dtype not in limits:
                    limits[dtype] = measure.ceilings(device, getattr(torch, dtype))
                if dtype not in run.entry["ceilings"]:
                    run.entry["ceilings"][dtype] = limits[dtype]
                    bar.say(f"\n{report.ceilings_of(run.entry, dtype)}\n{columns.headings()}")
                try:
                    rows = run.measure(case, dtype, limits[dtype], deadline)
                except groups.Poisoned as error:
                    print(f"bench: {case.name} {dtype} lost the device: {error}", file=sys.stderr)
                    if path is not None:
                        not_begun = names[names.index(op) + 1 :]
                        go_on(argv, options, time.perf_counter() - start, not_begun)
                    lost = True
                    break
                bar.say(columns.lines_of(rows), end="")
                bar.done()
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            failed |= run.failed or lost
            bar.say("\n".join(["", *report.remarks(run.entry)]))
            if run.late:
                bar.say(f"no time left for: {', '.join(run.late)}")
            if path is not None and path.exists():
                bar.say(f"wrote {path}")
            if lost:
                break
    if options.old:
        new = flat.flattened([flat.Folder("this run", Path(), measured)])
        print(f"\n{compare.told(options.old, [row for row in new if row['latest']])}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
