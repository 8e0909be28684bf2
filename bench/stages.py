"""Runs commands one stage after another inside a time budget, whatever becomes of each.

Standard library only. A stage that fails or overruns does not stop the next ones; its output goes
to a log as it comes, and the list of results is handed on after every stage, so that a run that is
cut short has reported all it did.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Seconds between asking a stage to end and ending it, and the least that is worth starting with.
GRACE = 3.0
LEAST = 5.0


@dataclass(frozen=True)
class Stage:
    """Commands run in order; seconds: for all of them together. missing: why it cannot run here.

    every: go on to the stage's next command after one failed. Stages that name the same log share
    that file.
    """

    name: str
    commands: list[list[str]]
    seconds: float
    log: str
    missing: str | None = None
    every: bool = False
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """status: ok, failed, timed out, skipped."""

    stage: Stage
    status: str
    seconds: float = 0.0
    reason: str = ""
    output: str = ""

    @property
    def good(self) -> bool:
        return self.status in ("ok", "skipped") and not self.reason.startswith("no time")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started: it leads its own group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _run(command: list[str], log: Path, seconds: float, stage: Stage, root: Path) -> int | None:
    """The exit status, None when it overran. Its output goes to the end of the log."""
    environment = {**os.environ, **stage.environment, "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as out:
        out.write(f"$ {' '.join(command)}\n".encode())
        out.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            out.write(f"{error}\n".encode())
            return 127
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            out.write(f"\nstopped after {seconds:.0f} s\n".encode())
            return None
        finally:
            _end(process)


def run_stage(stage: Stage, out: Path, seconds: float, root: Path) -> Result:
    """Run one stage within `seconds`."""
    log = out / stage.log
    begin = log.stat().st_size if log.exists() else 0
    start = time.monotonic()
    status, reasons = "ok", []
    for command in stage.commands:
        left = seconds - (time.monotonic() - start)
        code = _run(command, log, left, stage, root) if left > 0 else None
        if code is None:
            status = "timed out"
            reasons.append(f"stopped at its limit of {seconds:.0f} s")
            break
        if code != 0:
            status = "failed"
            reasons.append(f"exit status {code}")
            if not stage.every:
                break
    with log.open("rb") as file:
        file.seek(begin)
        output = file.read().decode(errors="replace")
    return Result(stage, status, time.monotonic() - start, "; ".join(reasons), output)


def run_stages(
    stages: list[Stage],
    out: Path,
    budget: float,
    root: Path,
    report: Callable[[list[Result]], None],
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Run the stages in order within `budget` seconds; report gets all results after each."""
    out.mkdir(parents=True, exist_ok=True)
    for name in {stage.log for stage in stages}:
        (out / name).unlink(missing_ok=True)
    end = time.monotonic() + budget
    results: list[Result] = []
    for stage in stages:
        left = end - time.monotonic() - 2 * GRACE
        if stage.missing is not None:
            result = Result(stage, "skipped", reason=stage.missing)
        elif left < min(LEAST, stage.seconds):
            result = Result(stage, "skipped", reason="no time left in the budget")
        else:
            limit = min(stage.seconds, left)
            say(f"[{stage.name}] at most {limit:.0f} s")
            result = run_stage(stage, out, limit, root)
        detail = f": {result.reason}" if result.reason else ""
        say(f"[{stage.name}] {result.status} after {result.seconds:.1f} s{detail}")
        results.append(result)
        report(results)
    return results
