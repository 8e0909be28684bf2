"""`make gpu` as far as it goes without a GPU: the stage runner, the plan, the summary."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import bench
from bench import environment, exercise, gpu, report, run, stages, vicreg
from bench.stages import Result, Stage, run_stages

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def go(out: Path, plan: list[Stage], budget: float = 60.0) -> list[Result]:
    return run_stages(plan, out, budget, ROOT, lambda results: None, say=lambda line: None)


def test_a_failing_stage_does_not_stop_the_next(tmp_path):
    results = go(
        tmp_path,
        [
            Stage("bad", [python("print('before'); raise SystemExit(3)")], 20, "bad.log"),
            Stage("absent", [["/no/such/program"]], 20, "absent.log"),
            Stage("good", [python("print('here')")], 20, "good.log"),
        ],
    )
    assert [r.status for r in results] == ["failed", "failed", "ok"]
    assert [r.good for r in results] == [False, False, True]
    assert results[0].reason == "exit status 3"
    assert "before" in results[0].output
    assert "No such file" in (tmp_path / "absent.log").read_text()
    assert (tmp_path / "good.log").read_text().endswith("here\n")


def test_a_stage_that_overruns_is_ended_with_its_children(tmp_path):
    beat = tmp_path / "beat"
    child = (
        "import time\n"
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
    slow, after = go(
        tmp_path,
        [
            Stage("slow", [python(parent), python("print('never')")], 3, "slow.log"),
            Stage("after", [python("print('after')")], 20, "after.log"),
        ],
    )
    assert time.monotonic() - start < 30
    assert (slow.status, after.status) == ("timed out", "ok")
    assert "begun" in slow.output
    assert "never" not in slow.output.split("stopped after")[1]
    assert beat.exists()
    last = beat.read_text()
    time.sleep(0.5)
    assert beat.read_text() == last


def test_a_stage_that_ignores_the_request_to_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    start = time.monotonic()
    (result,) = go(tmp_path, [Stage("deaf", [python(deaf)], 2, "deaf.log")])
    assert result.status == "timed out"
    assert time.monotonic() - start < 20


def test_the_budget_is_kept_and_what_did_not_fit_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 0.5)
    monkeypatch.setattr(stages, "LEAST", 2.0)
    wait = python("import time; time.sleep(600)")
    start = time.monotonic()
    first, second, third = go(
        tmp_path,
        [
            Stage("first", [wait], 300, "first.log"),
            Stage("second", [python("print(1)")], 30, "second.log"),
            Stage("tool", [["tool"]], 30, "tool.log", missing="tool is not installed"),
        ],
        budget=2 * stages.GRACE + stages.LEAST + 1,
    )
    assert time.monotonic() - start < 15
    assert first.status == "timed out"
    assert (second.status, second.reason) == ("skipped", "no time left in the budget")
    assert (third.status, third.reason) == ("skipped", "tool is not installed")
    assert not second.good, "work that did not fit is no success"
    assert third.good


def test_every_command_of_a_stage_runs_when_it_says_so(tmp_path):
    commands = [python("raise SystemExit(9)"), python("print('second')")]
    both, one = go(
        tmp_path,
        [
            Stage("both", commands, 20, "both.log", every=True),
            Stage("one", commands, 20, "one.log"),
        ],
    )
    assert (both.status, one.status) == ("failed", "failed")
    assert "\nsecond\n" in both.output
    assert "\nsecond\n" not in one.output


def test_logs_are_shared_fresh_and_written_as_they_come(tmp_path):
    (tmp_path / "log").write_text("of an earlier run\n")
    mark = "import os; print(os.environ['MARK'])"
    look = f"print('seen', '\\n7\\n' in open({str(tmp_path / 'log')!r}).read())"
    first, second = go(
        tmp_path,
        [
            Stage("one", [python(mark)], 20, "log", environment={"MARK": "7"}),
            Stage("two", [python(look)], 20, "log"),
        ],
    )
    text = (tmp_path / "log").read_text()
    assert "earlier" not in text
    assert "seen True" in second.output
    assert "MARK" in first.output
    assert "MARK" not in second.output, "each stage's own part of a shared log"


def test_the_summary_grows_stage_by_stage(tmp_path):
    plan = [
        Stage("one", [python("print('fine')")], 20, "one.log"),
        Stage("tests", [python("print('E  boom\\n3 failed in 1s'); raise SystemExit(1)")], 20, "t"),
    ]
    seen = []

    def report(results: list[Result]) -> None:
        seen.append(gpu.summarise(results, plan, "NVIDIA Test", tmp_path))

    run_stages(plan, tmp_path, 60, ROOT, report, say=lambda line: None)
    assert len(seen) == 2
    assert "| tests | not reached |" in seen[0]
    assert "exit status 1; 3 failed in 1s" in seen[1]
    assert "## tests: failed" in seen[1]
    assert "E  boom" in seen[1]
    assert "## Speed" not in seen[1]


def test_without_a_gpu_one_clear_line_and_status_2(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py")],
        env={"OUT": str(tmp_path / "out"), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no NVIDIA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_dry_run_lists_the_stages_in_order(tmp_path):
    """From another folder, with neither a PATH nor a home, as on a bare machine."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), "--dry-run"],
        env={"OUT": str(tmp_path), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    heads = [line.split(":")[0] for line in done.stdout.splitlines() if line[0] != " "]
    assert heads == [
        "build",
        "info",
        "tests",
        *(f"benchmark of {op}" for op in bench.OPS),
        "compute-sanitizer",
        "trainer",
        "the other cases",
        "ncu",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def plan(tmp_path, monkeypatch) -> list[Stage]:
    """The stages of all ops, whether or not they are here."""
    monkeypatch.setattr(gpu, "OPS", tuple(gpu.SECONDS))
    return gpu.make_stages(tmp_path, "90", "always")


def test_every_op_has_its_seconds():
    assert set(bench.OPS) <= gpu.SECONDS.keys()
    assert min(gpu.SECONDS.values()) > gpu.LAST_CASE


def test_the_plan_fits_its_rules(plan):
    assert plan[0].environment == {"VICREG_KERNELS_ARCHS": "90"}
    allowed = {sys.executable, gpu.tool("compute-sanitizer") or "compute-sanitizer"}
    allowed.add(gpu.tool("ncu") or "ncu")
    words = [word for stage in plan for command in stage.commands for word in command]
    assert {command[0] for stage in plan for command in stage.commands} <= allowed
    # this interpreter, and nothing that fetches, installs or makes an environment
    assert not {"pip", "venv", "ensurepip", "install", "uv", "curl", "wget", "git"} & set(words)
    assert not any("://" in word for word in words)
    # what comes first fits into the budget even if each stage takes all of its time
    first = plan[: 3 + len(gpu.SECONDS)]
    assert [stage.name for stage in first[3:]] == [f"benchmark of {op}" for op in gpu.SECONDS]
    assert sum(stage.seconds for stage in first) < 570
    # logs, a record an op and the summary: few files, in one folder
    assert len({stage.log for stage in plan}) <= 6


def arguments(plan: list[Stage], module: str) -> list[list[str]]:
    """What the stages give `python -m module`."""
    commands = [command for stage in plan for command in stage.commands]
    return [c[c.index(module) + 1 :] for c in commands if module in c]


def test_what_the_stages_run_takes_their_options(plan, tmp_path, monkeypatch):
    given = arguments(plan, "bench.run")
    assert len(given) == 2 * len(gpu.SECONDS)
    monkeypatch.setattr(run, "OPS", tuple(gpu.SECONDS))
    monkeypatch.setattr(run, "import_module", lambda name: vicreg)
    for op, words in zip([*gpu.SECONDS] * 2, given, strict=True):
        options = run.parse(words)
        assert (list(options.modules), options.device, options.lean) == ([op], "cuda", True)
        assert options.output == tmp_path
        assert options.missing == (options.seconds is None), "the second run adds what is left"
    ran = []
    monkeypatch.setattr(exercise, "OPS", tuple(gpu.SECONDS))
    monkeypatch.setattr(exercise, "small", lambda *what: ran.append(what) or 0)
    monkeypatch.setattr(exercise, "first_case", lambda *what: ran.append(what) or 0)
    for words in arguments(plan, "bench.exercise"):
        assert exercise.main([*words, "--device", "cpu", "--backend", "cpu"]) == 0
    # four checks of all ops, a profile of each
    assert sorted(ran) == sorted((op, "cpu", "cpu") for op in gpu.SECONDS for _ in range(5))
    for module in ("vicreg_kernels.cli", "bench.run", "bench.exercise"):
        assert arguments(plan, module)
        assert (ROOT / (module.replace(".", "/") + ".py")).exists()


def test_the_sanitizers_watch_every_ops_kernels(plan):
    (stage,) = [stage for stage in plan if stage.name == "compute-sanitizer"]
    watched = {"9attention", "attention::", "3ema", "6tokens", "6vicreg", *gpu.triton_kernels()}
    for command in stage.commands:
        names = {word[4:] for word in command if word.startswith("kns=")}
        assert watched <= names or "memcheck" in command
    assert stage.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    (profile,) = {word for c in plan[-1].commands for word in c if word.startswith("regex:")}
    assert re.search(profile.removeprefix("regex:"), "void ema::update<float>(float*)")
    assert re.search(profile.removeprefix("regex:"), gpu.triton_kernels()[-1])
    assert not re.search(profile.removeprefix("regex:"), "at::native::remainder<float>")


def test_the_runner_needs_only_the_standard_library():
    tree = ast.parse((ROOT / "bench" / "stages.py").read_text())
    names = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names - {"__future__"} <= sys.stdlib_module_names


def test_stale_libraries(tmp_path, monkeypatch):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "vicreg_kernels").mkdir()
    (tmp_path / "setup.py").write_text("")
    source = tmp_path / "csrc" / "a.cu"
    source.write_text("")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert "absent" in gpu.stale()
    for name in gpu.LIBRARIES:
        (tmp_path / "vicreg_kernels" / name).write_text("")
    assert gpu.stale() is None
    later = time.time() + 60
    os.utime(source, (later, later))
    assert "older than its sources" in gpu.stale()


def test_triton_kernels_are_found():
    names = gpu.triton_kernels()
    assert names
    text = "".join(p.read_text() for p in (ROOT / "vicreg_kernels").rglob("triton*.py"))
    assert all(f"def {name}(" in text for name in names)


def test_main_runs_the_stages_and_reports(tmp_path, monkeypatch, capsys):
    """The whole command with stages that need no GPU."""
    about = environment.describe(torch.device("cpu"))
    record = {"schema": report.SCHEMA, "op": "vicreg", "title": "A loss", "contenders": {}}
    record["runs"] = [{**about, "ceilings": {}, "rows": [], "skipped": []}]
    path = tmp_path / "vicreg.json"
    path.write_text("of an earlier run")
    write = f"open({str(path)!r}, 'w').write({json.dumps(record)!r})"
    plan = [
        Stage("tests", [python("raise SystemExit(1)")], 20, "tests.log"),
        Stage("bench", [python(write)], 20, "bench.log"),
    ]
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "find_gpu", lambda: ("NVIDIA Test", "90"))
    monkeypatch.setattr(gpu, "make_stages", lambda *args: plan)
    assert gpu.main([]) == 1
    summary = (tmp_path / "summary.md").read_text()
    assert capsys.readouterr().out.endswith("\n" + summary + "\n")
    assert "# NVIDIA Test" in summary
    assert "| bench | ok |" in summary
    assert "## Speed\n\n### vicreg\n\n```\nA loss\n" in summary
    monkeypatch.setattr(gpu, "make_stages", lambda *args: plan[1:])
    assert gpu.main([]) == 0


def test_exercise_counts_what_is_not_finite(monkeypatch, capsys):
    assert vicreg.exercise("reference", "cpu") == 0
    real = vicreg.vicreg_loss
    monkeypatch.setattr(vicreg, "vicreg_loss", lambda *a, **k: real(*a, **k) * float("nan"))
    assert vicreg.exercise("reference", "cpu") == 2 * len(vicreg.SMALL) * 3


def test_an_exercise_that_fails_does_not_stop_the_next(monkeypatch, capsys):
    def failing(backend, device):
        raise RuntimeError("misaligned address")

    ran = []
    ops = {"one": failing, "two": lambda *what: ran.append(what) or 0, "three": None}
    modules = {f"bench.{op}": types.SimpleNamespace(exercise=run) for op, run in ops.items()}
    del modules["bench.three"].exercise
    monkeypatch.setattr(exercise, "OPS", tuple(ops))
    monkeypatch.setattr(exercise, "import_module", modules.__getitem__)
    options = ["--device", "cpu", "--backend", "cpu"]
    assert exercise.main(options) == 1
    assert ran == [("cpu", "cpu")]
    assert "misaligned address" in capsys.readouterr().err
    assert exercise.main([*options, "--op", "two", "--op", "three"]) == 0
    assert exercise.main(["--device", "cpu", "--backend", "cuda", "--op", "two"]) == 1


def test_the_first_case_is_exercised_at_its_size(monkeypatch):
    case = vicreg.case(24, 64)
    calls = []
    real = vicreg.vicreg_loss
    monkeypatch.setattr(
        vicreg, "vicreg_loss", lambda x, y, **k: calls.append((x.shape, k)) or real(x, y, **k)
    )
    monkeypatch.setattr(vicreg, "CASES", {case.name: case})
    assert exercise.first_case("vicreg", "reference", "cpu") == 0
    assert calls == [((24, 64), {"backend": "reference"})]
