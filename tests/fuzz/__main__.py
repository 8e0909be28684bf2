"""`python -m tests.fuzz [op ...]`: random calls of each op, each in a process of its own, so that a
crash fails with its line like any other fault. Ends with 1 where there is one.

    --seconds N    for each op; by default VICREG_KERNELS_FUZZ_SECONDS, or 60
    --start N      the first number of the seeds; by default another one every time
    --seed NAME    run that one line alone and show what comes
    --sanitized    on the CPU kernels built with ASan and UBSan (tests/helpers/native.py)
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.fuzz import campaign, ops, runner
from tests.helpers import native
from vicreg_kernels.core import library

ROOT = Path(__file__).resolve().parents[2]


def child(op: str, options: argparse.Namespace) -> int:
    """This process: one op's campaign. The line that runs stands in options.line."""
    for path in options.library:
        torch.ops.load_library(path)
    if options.library:
        library.NAMESPACES["cpu"] = "vicreg_kernels_sanitized"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    current = os.open(options.line, os.O_WRONLY)

    def note(line: str) -> None:
        os.pwrite(current, line.encode() + b"\n", 0)
        os.ftruncate(current, len(line.encode()) + 1)

    seeds = (f"{op}/{n}" for n in itertools.count(options.start))
    with campaign.one_thread():
        report = campaign.run(seeds, options.seconds, before=note)
    print(report.text(), flush=True)
    return 1 if report.faults else 0


def parent(op: str, options: argparse.Namespace) -> bool:
    """Whether one op's campaign, in a process of its own, found nothing."""
    with tempfile.NamedTemporaryFile("r", suffix=".txt") as line:
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", op, "--line", line.name]
        command += ["--seconds", str(options.seconds), "--start", str(options.start)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if options.sanitized:
            for folder in ops.FOLDERS[op]:
                command += ["--library", str(native.sanitized(folder))]
            environment |= native.sanitizer_environment()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        print(f"{op}: {done.stdout.strip()}", flush=True)
        if done.returncode not in (0, 1) or not done.stdout:
            print(f"  it ended with {done.returncode} in {line.read()}{done.stderr[-4000:]}")
    return done.returncode == 0


def show(seed: str) -> int:
    line = campaign.line_of(seed) if "(" not in seed else seed
    print(line)
    try:
        print(runner.hold(line))
    except runner.Fault as fault:
        print(f"fault: {fault}")
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=runner.OPS)
    seconds = float(os.environ.get("VICREG_KERNELS_FUZZ_SECONDS", "60"))
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--start", type=int, default=int(time.time()) * 1000)
    parser.add_argument("--seed")
    parser.add_argument("--sanitized", action="store_true")
    parser.add_argument("--line", help=argparse.SUPPRESS)
    parser.add_argument("--library", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seed is not None:
        return show(options.seed)
    if options.line is not None:
        return child(options.ops[0], options)
    return 0 if all([parent(op, options) for op in options.ops]) else 1


if __name__ == "__main__":
    sys.exit(main())
