"""`make gpu`, `make gpu-bench` and `make gpu-check` as far as they go without a GPU: the command,
its plans, the summary and the archive.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
from bench import exercise, gpu, gpu_stages, run, stages, vicreg
from bench.gpu_stages import NAMES, OPS, Setting
from bench.stages import FAIL, NOT_REACHED, PASS, SKIPPED, Stage, Verdict

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """A machine that has compute-sanitizer and ncu."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("compute-sanitizer", "ncu"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


@pytest.fixture
def setting(tmp_path) -> Setting:
    """Of a GPU of capability 9.0 where the libraries must be built."""
    return Setting(ROOT, tmp_path / "work", capability="90", build="always", workers=8)


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """From another folder, with neither a PATH nor a home, as on a bare machine."""
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), *words],
        env={"PATH": "", **environment},
        cwd="/",
        capture_output=True,
        text=True,
    )


def test_without_a_gpu_one_clear_line_and_status_2(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = command(OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no NVIDIA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_dry_run_lists_the_stages_in_order(tmp_path, capsys):
    figures = [f"figures of {op}" for op in OPS]
    tests = {
        "gpu": ["build", "info", "parity", *figures],
        "bench": ["build", "info", *figures, "trainer", "compiled figures"],
        "check": [
            "build", "info", "graphs", "memcheck", "racecheck", "initcheck", "synccheck",
            "memcheck of Triton", "ncu",
        ],
    }  # fmt: skip
    printed = command("gpu", "--dry-run", OUT=str(tmp_path)).stdout
    assert list(tmp_path.iterdir()) == []
    for name, expected in tests.items():
        if name != "gpu":
            assert gpu.main([name, "--dry-run"]) == 0
            printed = capsys.readouterr().out
        lines = printed.splitlines()
        assert [line.split(":")[0] for line in lines if line[0] != " "] == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["figures"], "invalid choice: 'figures'"),
        (["--ops", "vicreg,no_op"], "--ops: no_op not in"),
        (["--inject", "crash"], "--inject and --carry are of --rehearse"),
        (["bench", "--rehearse", "--inject", "hang"], "bench runs no tests"),
    ],
)
def test_what_cannot_be_is_refused(words, said, capsys):
    with pytest.raises(SystemExit) as error:
        gpu.main(words)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("build", ["always", "auto"])
@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_limits_add_up_to_the_budget(name, with_tools, build, setting, request):
    """On a machine where a command is killed after 600 s."""
    if with_tools:
        request.getfixturevalue("tools")
    plan = gpu_stages.plan(replace(setting, build=build), name)
    assert setting.budget == gpu.parse([name]).budget == 570
    assert sum(stage.seconds for stage in plan) <= 570 - gpu_stages.RESERVE + 1e-6
    for stage in plan:
        if stage.missing is None and stage.name != "build":
            assert stage.seconds > stages.ending_seconds() + gpu_stages.LAST_CASE, stage.name
    names = [stage.log for stage in plan]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", NAMES)
def test_no_stage_fetches_or_installs(name, setting, tools):
    plan = gpu_stages.plan(setting, name)
    allowed = {sys.executable, str(tools / "compute-sanitizer"), str(tools / "ncu")}
    commands = [command for stage in plan for command in stage.commands]
    assert {command[0] for command in commands} <= allowed
    words = {word for command in commands for word in command}
    assert not {"pip", "venv", "ensurepip", "install", "uv", "curl", "wget", "git"} & words
    assert not any("://" in word for word in words)


def arguments(plan: list[Stage], module: str) -> list[list[str]]:
    """What the stages give `python -m module`."""
    commands = [command for stage in plan for command in stage.commands]
    return [c[c.index(module) + 1 :] for c in commands if module in c]


def test_benchmarks_take_their_options(setting, monkeypatch):
    def parsed(name):
        for words in arguments(gpu_stages.plan(setting, name), "bench.run"):
            yield run.parse(words)

    first, every = list(parsed("gpu")), list(parsed("bench"))
    for options, op in zip([*first, *every], [*OPS, *OPS, None], strict=True):
        assert list(options.modules) == ([op] if op else list(OPS))
        assert options.device == "cuda"
        assert options.output == setting.records
    assert all(o.lean and o.without_compiled for o in first)
    assert all(not o.lean and o.without_compiled and not o.missing for o in every[:-1])
    compiled = every[-1]
    assert compiled.missing
    assert not compiled.without_compiled


def test_every_op_is_measured_but_those_of_the_cpu():
    assert set(bench.ALL) - set(OPS) == {"ranks"}


def figures(setting, monkeypatch, rows, ours=True, before=()) -> Verdict:
    """A benchmark's stage whose process writes these contenders' rows."""
    setting.records.mkdir(parents=True)
    path = setting.records / "ema.json"

    def record(names):
        runs = [{"rows": [{"contender": name} for name in names]}]
        return json.dumps({"op": "ema", "runs": runs})

    if before:
        path.write_text(record(before))
    seen = []

    def run_commands(stage, log, seconds, root):
        seen.append(stage.commands[0])
        if rows is not None:
            path.write_text(record([*before, *rows]))
        reason = stage.check("")
        return Verdict(FAIL if reason else PASS, reason or "")

    monkeypatch.setattr(stages, "run_commands", run_commands)
    stage = gpu_stages.figures_stage(setting, "figures of ema", ["ema"], [], ours)
    verdict = stage.action(setting.work / "log", 21.0)
    assert seen[0][-2:] == ["--seconds", "12"], "told to end by itself"
    return verdict


@pytest.mark.parametrize(
    ("rows", "ours", "before", "status"),
    [
        (["ours", "eager"], True, (), PASS),
        (["ours_triton"], True, (), PASS),
        (["eager"], True, (), FAIL),
        ([], True, (), FAIL),
        (None, True, (), FAIL),
        ([], True, ["ours"], FAIL),
        ([], False, ["ours"], FAIL),
        (["compiled"], False, ["ours"], PASS),
    ],
)
def test_a_benchmark_that_adds_no_row_has_failed(setting, monkeypatch, rows, ours, before, status):
    verdict = figures(setting, monkeypatch, rows, ours, before)
    assert verdict.status == status, verdict.reason
    assert status == PASS or "was written for ema" in verdict.reason


def test_the_sanitizers_watch_the_cuda_kernels_and_some_of_triton(setting, tools, monkeypatch):
    plan = {stage.name: stage for stage in gpu_stages.plan(setting, "check")}
    ops = gpu_stages.exercised(setting)
    assert {"vicreg", "attention", "ema", "tokens", "sigreg", "barlow", "vicregl"} <= set(ops)
    for name in ("memcheck", "racecheck", "initcheck", "synccheck", "memcheck of Triton"):
        stage = plan[name]
        given = arguments([stage], "bench.exercise")
        backend = "triton" if "Triton" in name else "cuda"
        ops_given = [words[words.index("--op") + 1] for words in given]
        assert ops_given == ops, "a process an op"
        assert {words[words.index("--backend") + 1] for words in given} == {backend}
        assert all(("--smallest" in words) == (backend == "triton") for words in given)
        for words in stage.commands:
            watched = {word[4:] for word in words if word.startswith("kns=")}
            assert {"9attention", "attention::", "3ema", "6vicreg"} <= watched or "memcheck" in name
        assert stage.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    ran = []
    monkeypatch.setattr(exercise, "small", lambda *what: ran.append(what) or 0)
    for words in arguments([plan["memcheck"]], "bench.exercise"):
        words = [*words, "--device", "cpu", "--backend", "cpu"]
        words.remove("cuda")
        words.remove("--device")
        words[words.index("cuda")] = "cpu"
        assert exercise.main(shlex.split(shlex.join(words))) == 0
    assert sorted({op for op, *_ in ran}) == sorted(ops)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("{op} cuda: 0 results\n========= ERROR SUMMARY: 0 errors\n", None),
        ("{op} cuda: 0 results\n========= RACECHECK SUMMARY: 0 hazards\n", None),
        ("{op} cuda: 0 results\n", "0 of 1 processes have a verdict"),
        ("========= ERROR SUMMARY: 0 errors\n", "nothing was exercised of ema"),
        ("", "nothing was exercised of ema"),
    ],
)
def test_a_sanitizer_that_watched_nothing_has_failed(setting, tools, output, reason):
    stage = gpu_stages.sanitizer_stage(replace(setting, ops=["ema"]), "memcheck", "cuda")
    assert stage.check(output.format(op="ema")) == reason


def test_a_profile_or_comparison_of_nothing_has_failed(setting, tools):
    (profile,) = [s for s in gpu_stages.plan(setting, "check") if s.name == "ncu"]
    assert "0 kernels were profiled" in profile.check("==WARNING== No kernels were profiled.\n")
    assert profile.check("==PROF== Profiling x\n" * len(profile.commands)) is None
    (regex,) = {word for words in profile.commands for word in words if word.startswith("regex:")}
    assert re.search(regex.removeprefix("regex:"), "void ema::update<float>(float*)")
    assert re.search(regex.removeprefix("regex:"), gpu_stages.triton_kernels(ROOT)[-1])
    assert not re.search(regex.removeprefix("regex:"), "at::native::remainder<float>")
    trainer = gpu_stages.trainer_stage(setting)
    row = "vicreg     6.81/s      1.09/s   6.25x      17      160   1.4e-07\n"
    assert trainer.check(row * 6) is None
    assert trainer.check(row * 5) == "5 of 6 recipes were compared"


def test_the_trainer_alone_has_the_packages_on_its_path(setting, tmp_path):
    plan = gpu_stages.plan(replace(setting, packages=tmp_path / "packages"), "bench")
    have = [
        s.name for s in plan if str(tmp_path / "packages") in s.environment.get("PYTHONPATH", "")
    ]
    assert have == ["trainer"]
    lacking = gpu_stages.plan(replace(setting, trainer_missing="pydantic is absent"), "bench")
    assert [s.name for s in lacking if s.missing] == ["trainer"]


def test_stale_libraries(tmp_path, setting):
    setting = replace(setting, root=tmp_path, build="auto")
    for folder in ("csrc", "vicreg_kernels", "build"):
        (tmp_path / folder).mkdir()
    (tmp_path / "setup.py").write_text("")
    source = tmp_path / "csrc" / "a.cu"
    source.write_text("1")
    assert "absent" in gpu_stages.stale(setting)
    for name in gpu_stages.LIBRARIES:
        (tmp_path / "vicreg_kernels" / name).write_text("")
    assert gpu_stages.stale(setting) is None
    later = time.time() + 60
    os.utime(source, (later, later))
    assert "older than its sources" in gpu_stages.stale(setting)
    # of a tree that was copied anew, the content counts
    files = [tmp_path / "vicreg_kernels" / name for name in gpu_stages.LIBRARIES]
    times = [path.stat().st_mtime_ns for path in files]
    stamp = {"sources": gpu_stages.fingerprint(setting), "libraries": times}
    (tmp_path / gpu_stages.STAMP).write_text(json.dumps(stamp))
    assert gpu_stages.stale(setting) is None
    assert "not those" in gpu_stages.stale(replace(setting, capability="80"))
    source.write_text("2")
    assert "not those" in gpu_stages.stale(setting)


SETUP = """
import pathlib, sys
here = pathlib.Path("vicreg_kernels")
for name in {names}:
    (here / name).write_text("built")
print("csrc/a.cu(3): error: no such thing")
sys.exit({code})
"""


@pytest.mark.parametrize(
    ("names", "code", "status", "said"),
    [
        (["_C.abi3.so", "_C_cuda.abi3.so"], 0, PASS, ""),
        (["_C.abi3.so"], 1, FAIL, "_C_cuda.abi3.so was not built; csrc/a.cu(3): error"),
        (["_C.abi3.so"], 0, FAIL, "_C_cuda.abi3.so was not built"),
        ([], 1, FAIL, "exit status 1; _C.abi3.so, _C_cuda.abi3.so was not built"),
    ],
)
def test_a_build_is_good_when_both_libraries_are_there(
    tmp_path, setting, names, code, status, said
):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "vicreg_kernels").mkdir()
    for name in gpu_stages.LIBRARIES:  # of an earlier build, which must not be taken for this one's
        (tmp_path / "vicreg_kernels" / name).write_text("old")
    (tmp_path / "setup.py").write_text(SETUP.format(names=names, code=code))
    setting = replace(setting, root=tmp_path, say=lambda line: None)
    verdict = gpu_stages.build_stage(setting).action(tmp_path / "build.log", 20)
    assert verdict.status == status
    assert said in verdict.reason
    assert (gpu_stages.stale(replace(setting, build="auto")) is None) == (status == PASS)
    refused = gpu_stages.build_stage(replace(setting, build="never", capability="80"))
    assert refused.action(tmp_path / "build.log", 20).status == FAIL


def test_main_runs_the_stages_and_reports_after_each(tmp_path, monkeypatch, capsys):
    """With stages that need no GPU, of which one looks at what a kill would leave behind."""
    look = (
        "import os, pathlib, tarfile\n"
        "out = pathlib.Path(os.environ['OUT'])\n"
        "print(sorted(p.name for p in out.iterdir()), (out / 'summary.md').read_text())\n"
        "print(tarfile.open(out / 'results.tar.gz').getnames())\n"
    )
    plan = [
        Stage("tests", [python("print('boom'); raise SystemExit(1)")]),
        Stage("look", [python(look)]),
    ]
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "find_gpu", lambda: ("NVIDIA Test", "90", 1 << 36))
    monkeypatch.setattr(gpu_stages, "plan", lambda *args: plan)
    assert gpu.main([]) == 1
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert capsys.readouterr().out.endswith("\n" + summary + "\n")
    assert summary.startswith("# FAIL: bench.gpu gpu on NVIDIA Test")
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        looked = archive.extractfile("logs/look.log").read().decode()
        assert archive.extractfile("summary.md").read().decode() == summary
    assert "['results.tar.gz', 'summary.md']" in looked
    assert "- FAIL tests" in looked
    assert f"- {NOT_REACHED} look" in looked
    assert "'logs/tests.log'" in looked
    plan[0] = Stage("tests", [python("print('fine')")])
    assert gpu.main([]) == 0
    plan.append(Stage("trainer", missing="pydantic is absent"))
    assert gpu.main([]) == 1, "a skipped stage is not good"
    assert f"# {SKIPPED}" in (tmp_path / "out" / "summary.md").read_text()


def test_exercise_counts_what_is_not_finite(monkeypatch, capsys):
    assert vicreg.exercise("reference", "cpu") == 0
    assert exercise.smallest("vicreg", "reference", "cpu") == 0
    real, calls = vicreg.vicreg_loss, []
    monkeypatch.setattr(
        vicreg, "vicreg_loss", lambda *a, **k: calls.append(1) or real(*a, **k) * float("nan")
    )
    assert vicreg.exercise("reference", "cpu") == 2 * len(vicreg.SMALL) * 2 * 3
    calls.clear()
    grad = torch.autograd.grad
    assert exercise.smallest("vicreg", "reference", "cpu") == 2
    assert len(calls) == 1, "one shape and dtype"
    assert torch.autograd.grad is grad


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
    assert calls == [((24, 64), {"backend": "reference", "precision": None})]
