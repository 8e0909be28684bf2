"""The runner of `make gpu`'s stages: what fails or overruns stops nothing and is said."""

from __future__ import annotations

import ast
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import stages
from bench.stages import FAIL, NOT_REACHED, PASS, SKIPPED, Result, Stage, Verdict, run_stages

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def go(logs: Path, plan: list[Stage], budget: float = 60.0) -> list[Result]:
    return run_stages(plan, logs, budget, ROOT, lambda results: None, say=lambda line: None)


def statuses(results: list[Result]) -> list[str]:
    return [result.verdict.status for result in results]


def test_a_failing_stage_does_not_stop_the_next(tmp_path):
    results = go(
        tmp_path,
        [
            Stage("bad", [python("print('before'); raise SystemExit(3)")]),
            Stage("absent", [["/no/such/program"]]),
            Stage("dead", [python("import os; os.kill(os.getpid(), 11)")]),
            Stage("good", [python("print('here')")]),
        ],
    )
    assert statuses(results) == [FAIL, FAIL, FAIL, PASS]
    assert [result.good for result in results] == [False, False, False, True]
    assert results[0].verdict.reason == "exit status 3"
    assert results[2].verdict.reason == "ended by SIGSEGV"
    assert "before" in results[0].verdict.output
    assert "No such file" in (tmp_path / "absent.log").read_text()
    assert (tmp_path / "good.log").read_text().endswith("here\n")


def test_a_stage_that_overruns_is_ended_with_its_children(tmp_path, monkeypatch):
    """On a clock that goes on to a second before the stage must be ended, once its child runs:
    however busy the machine is, there is a child to end.
    """
    beat = tmp_path / "beat"
    child = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "while True:\n"
        f"    open({str(beat)!r}, 'w').write(str(time.time()))\n"
        "    time.sleep(0.05)"
    )
    parent = (
        "import subprocess, sys, time\n"
        "print('begun', flush=True)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(600)"
    )
    start = time.monotonic()
    jumps: list[float] = []

    def now() -> float:
        if beat.exists() and not jumps:
            jumps.append(start + 300 - stages.ending_seconds() - 1 - time.monotonic())
        return time.monotonic() + sum(jumps)

    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))
    slow, after = go(
        tmp_path,
        [
            Stage("slow", [python(parent), python("print('never')")], 300),
            Stage("after", [python("print('after')")], 300),
        ],
        budget=600,
    )
    assert statuses([slow, after]) == [FAIL, PASS]
    assert slow.verdict.reason == "stopped at its limit of 300 s, 2 of 2 commands left"
    assert slow.seconds <= 300.5, "the limit holds for the ending as well"
    assert "begun" in slow.verdict.output
    # SIGINT comes first: Python says where it was
    assert "KeyboardInterrupt" in slow.verdict.output
    assert "\nnever\n" not in slow.verdict.output
    last = beat.read_text()
    time.sleep(0.5)
    assert beat.read_text() == last


def test_a_stage_that_ignores_requests_to_end_is_ended(tmp_path, monkeypatch):
    short = tuple((number, 0.3) for number, _ in stages.ENDINGS)
    monkeypatch.setattr(stages, "ENDINGS", short)
    deaf = (
        "import signal, time\n"
        "for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, signal.SIG_IGN)\n"
        "time.sleep(600)"
    )
    start = time.monotonic()
    (result,) = go(tmp_path, [Stage("deaf", [python(deaf)], 4)])
    assert result.verdict.status == FAIL
    assert time.monotonic() - start < 20


def test_the_budget_is_kept_and_what_did_not_fit_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "ENDINGS", tuple((n, 0.2) for n, _ in stages.ENDINGS))
    monkeypatch.setattr(stages, "LEAST", 1.0)
    wait = python("import time; time.sleep(600)")
    start = time.monotonic()
    first, second, third = go(
        tmp_path,
        [
            Stage("first", [wait], 300),
            Stage("second", [python("print(1)")]),
            Stage("tool", [["tool"]], missing="tool is not installed"),
        ],
        budget=3,
    )
    assert time.monotonic() - start < 10
    assert statuses([first, second, third]) == [FAIL, NOT_REACHED, SKIPPED]
    assert second.verdict.reason == "no time left in the budget"
    assert third.verdict.reason == "tool is not installed"
    assert not second.good, "work that did not fit is no success"
    assert not third.good, "what was skipped is not proved"


def test_only_a_stage_that_stretches_takes_what_was_saved(tmp_path):
    given = {}

    def action(name):
        def run(log: Path, seconds: float) -> Verdict:
            given[name] = seconds
            return Verdict(PASS)

        return run

    go(
        tmp_path,
        [
            Stage("quick", seconds=40, action=action("quick")),
            Stage("fixed", seconds=10, action=action("fixed")),
            Stage("stretched", seconds=20, action=action("stretched"), stretch=True),
            Stage("last", seconds=30, action=action("last")),
        ],
        budget=100,
    )
    assert given["fixed"] == 10
    assert given["stretched"] == pytest.approx(70, abs=5), "the last one's seconds are left to it"
    assert given["last"] == 30


def test_every_command_of_a_stage_runs_when_it_says_so(tmp_path):
    commands = [python("raise SystemExit(9)"), python("print('second')")]
    both, one = go(tmp_path, [Stage("both", commands, every=True), Stage("one", commands)])
    assert statuses([both, one]) == [FAIL, FAIL]
    assert both.verdict.reason == "command 1: exit status 9"
    assert "\nsecond\n" in both.verdict.output
    assert "\nsecond\n" not in one.verdict.output


def test_commands_side_by_side_have_whole_logs(tmp_path):
    meet = (
        "import pathlib, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / ('at' + sys.argv[1])).touch()\n"
        "while len(list(here.glob('at*'))) < 2: time.sleep(0.02)\n"
        "print('line', sys.argv[1])"
    )
    commands = [[*python(meet), "0"], [*python(meet), "1"], python("raise SystemExit(2)")]
    (result,) = go(tmp_path, [Stage("pair", commands, workers=2, every=True)])
    assert result.verdict.reason == "command 3: exit status 2"
    text = (tmp_path / "pair.log").read_text()
    assert text.index("line 0") < text.index("line 1"), "in the order of the commands"
    assert not list(tmp_path.glob("pair.?"))


def test_a_check_fails_what_ended_well(tmp_path):
    def check(output: str) -> str | None:
        return None if "worked" in output else "nothing was done"

    busy_code = "print('worked\\nnote: 3 left')"
    idle, busy = go(
        tmp_path,
        [
            Stage("idle", [python("pass")], check=check),
            Stage("busy", [python(busy_code)], check=check, notes="note: .*"),
        ],
    )
    assert statuses([idle, busy]) == [FAIL, PASS]
    assert idle.verdict.reason == "nothing was done"
    assert busy.verdict.notes == ["note: 3 left"]


def test_an_action_that_raises_fails_its_stage_alone(tmp_path):
    def broken(log: Path, seconds: float) -> Verdict:
        raise KeyError("a mistake of the runner")

    first, second = go(
        tmp_path, [Stage("broken", action=broken), Stage("next", [python("print(1)")])]
    )
    assert statuses([first, second]) == [FAIL, PASS]
    assert "KeyError: 'a mistake of the runner'" in first.verdict.reason


def test_logs_are_fresh_and_environments_apart(tmp_path):
    (tmp_path / "one.log").write_text("of an earlier run\n")
    mark = python("import os; print(os.environ.get('MARK'))")
    first, second = go(
        tmp_path, [Stage("one", [mark], environment={"MARK": "7"}), Stage("2", [mark])]
    )
    assert "earlier" not in (tmp_path / "one.log").read_text()
    assert first.verdict.output.endswith("\n7\n")
    assert second.verdict.output.endswith("\nNone\n")


@pytest.mark.parametrize("name", ["stages", "gpu_summary", "gpu_records", "gpu_packages"])
def test_the_runner_needs_only_the_standard_library(name):
    tree = ast.parse((ROOT / "bench" / f"{name}.py").read_text())
    names = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names - {"__future__", "bench"} <= sys.stdlib_module_names
