"""Runs the stages of a command one after another inside a time budget, whatever becomes of each.

Standard library only. A stage that fails or overruns does not stop the next ones. Its output goes
to a log as it comes, and the list of results is handed on after every stage, so that a run that is
cut short has reported all it did.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASS, FAIL, SKIPPED, NOT_REACHED = "PASS", "FAIL", "SKIPPED (not proved)", "NOT REACHED"
# What an overrunning process gets, and for how long: SIGINT first, with which Python and pytest
# print where they were.
ENDINGS = ((signal.SIGINT, 3.0), (signal.SIGTERM, 1.0), (signal.SIGKILL, 1.0))
# The least seconds that are worth starting a stage with.
LEAST = 4.0
POLL = 0.05


@dataclass(frozen=True)
class Verdict:
    """What a stage came to. tests: node id or title -> why it failed, one line each."""

    status: str
    reason: str = ""
    output: str = ""
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """Commands, run one after another, or up to `workers` of them at the same time.

    seconds: for all of them together, the time to end the last ones included. missing: why the
    stage cannot run here. every: go on to the next command after one failed. check: looks at the
    output of all commands and gives the reason why they did not do their work, though they ended
    well; None when they did. action: runs in place of commands, with the log's path and the seconds
    it has. notes: a pattern of lines of the output that the summary repeats. stretch: the stage may
    also take what the stages before it have saved.
    """

    name: str
    commands: list[list[str]] = field(default_factory=list)
    seconds: float = 30.0
    missing: str | None = None
    every: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    workers: int = 1
    check: Callable[[str], str | None] | None = None
    action: Callable[[Path, float], Verdict] | None = None
    notes: str | None = None
    stretch: bool = False

    @property
    def log(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + ".log"


@dataclass
class Result:
    stage: Stage
    verdict: Verdict
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """A stage that was skipped or not reached has proved nothing, and is not good."""
        return self.verdict.status == PASS


def ending_seconds() -> float:
    return sum(seconds for _, seconds in ENDINGS)


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends processes, which lead their own groups, and whatever is left of what they started."""
    for number, seconds in ENDINGS:
        until = time.monotonic() + seconds
        for process in processes:
            try:
                os.killpg(process.pid, number)
            except (ProcessLookupError, PermissionError):
                process.poll()
        while time.monotonic() < until and not all(map(_gone, processes)):
            time.sleep(POLL)
    for process in processes:
        process.wait()


def _gone(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process and its whole group have ended. Members that nobody reaps, as in a
    container without an init, have ended too.
    """
    if process.poll() is None:
        return False
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return True
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # after the name in parentheses: state, parent, group
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(group) == process.pid and state not in "ZX":
            return False
    return True


def start(
    command: Sequence[str], log: Path, environment: dict[str, str], root: Path
) -> subprocess.Popen[bytes] | None:
    """Starts a command whose output goes to the end of the log; None where there is none such."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        out.write(f"$ {' '.join(' '.join(command).split())}\n".encode())
        out.flush()
        try:
            return subprocess.Popen(
                command,
                cwd=root,
                env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            out.write(f"{error}\n".encode())
            return None


def describe(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"


def run_commands(stage: Stage, log: Path, seconds: float, root: Path) -> Verdict:
    """Runs a stage's commands within `seconds`, of which the last are kept for ending them."""
    until = time.monotonic() + max(seconds - ending_seconds(), seconds / 2)
    waiting = list(enumerate(stage.commands))
    running: list[tuple[int, subprocess.Popen[bytes], Path]] = []
    reasons: dict[int, str] = {}
    late = False

    def part(number: int) -> Path:
        """Commands that run side by side write to logs of their own, joined in the end."""
        return log.with_suffix(f".{number}") if stage.workers > 1 else log

    while waiting or running:
        failed = bool(reasons) and not stage.every
        while waiting and len(running) < stage.workers and not failed:
            number, command = waiting.pop(0)
            process = start(command, part(number), stage.environment, root)
            if process is None:
                reasons[number] = f"{command[0]} cannot be started"
                failed = not stage.every
            else:
                running.append((number, process, part(number)))
        if failed:
            waiting = []
        if time.monotonic() > until:
            late = True
            break
        for item in list(running):
            code = item[1].poll()
            if code is not None:
                running.remove(item)
                end([item[1]])  # what it may have left behind
                if code != 0:
                    reasons[item[0]] = describe(code)
        if running:
            time.sleep(POLL)
    end([process for _, process, _ in running])
    for number, _ in enumerate(stage.commands):
        path = part(number)
        if path != log and path.exists():
            with log.open("ab") as out:
                out.write(path.read_bytes() + b"\n")
            path.unlink()
    output = log.read_text(errors="replace") if log.exists() else ""
    why = [
        reason if len(stage.commands) == 1 else f"command {number + 1}: {reason}"
        for number, reason in sorted(reasons.items())
    ]
    if late:
        left = len(waiting) + len(running)
        of = "" if len(stage.commands) == 1 else f", {left} of {len(stage.commands)} commands left"
        why.append(f"stopped at its limit of {seconds:.0f} s{of}")
    said = "\n".join(line for line in output.splitlines() if not line.startswith("$ "))
    checked = stage.check(said) if stage.check else None
    if checked:
        why.append(checked)
    notes = re.findall(stage.notes, said, re.MULTILINE) if stage.notes else []
    return Verdict(FAIL if why else PASS, "; ".join(why), output, notes=notes)


def run_stages(
    stages: Sequence[Stage],
    logs: Path,
    budget: float,
    root: Path,
    report: Callable[[list[Result]], Any],
    say: Callable[[str], Any] = print,
) -> list[Result]:
    """Runs the stages in order within `budget` seconds. `report` gets all results after each."""
    logs.mkdir(parents=True, exist_ok=True)
    finish = time.monotonic() + budget
    results: list[Result] = []
    for number, stage in enumerate(stages):
        begun = time.monotonic()
        left = finish - begun
        later = sum(other.seconds for other in stages[number + 1 :])
        own = max(stage.seconds, left - later) if stage.stretch else stage.seconds
        log = logs / stage.log
        log.unlink(missing_ok=True)
        if stage.missing is not None:
            verdict = Verdict(SKIPPED, stage.missing)
        elif left < min(LEAST, stage.seconds):
            verdict = Verdict(NOT_REACHED, "no time left in the budget")
        else:
            limit = min(own, left)
            say(f"[{stage.name}] at most {limit:.0f} s")
            try:
                if stage.action is not None:
                    verdict = stage.action(log, limit)
                else:
                    verdict = run_commands(stage, log, limit, root)
            except Exception as error:  # the runner's own mistake does not stop the next stage
                verdict = Verdict(FAIL, f"{type(error).__name__}: {error}")
        results.append(Result(stage, verdict, time.monotonic() - begun))
        detail = f": {verdict.reason}" if verdict.reason else ""
        say(f"[{stage.name}] {verdict.status} after {results[-1].seconds:.1f} s{detail}")
        report(results)
    return results
