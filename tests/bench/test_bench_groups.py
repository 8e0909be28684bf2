"""How a case is measured: which contenders together, what is kept when, ours on each backend."""

from __future__ import annotations

import itertools
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import groups, measure, report, run
from bench.case import Case, Plan
from tests.helpers.bench_fake import (  # noqa: F401
    CPU,
    LIMITS,
    fake_fixture,
    fake_op,
    fake_plan,
    go,
    pairs,
    read,
)
from vicreg_kernels.core import dispatch

ROOT = Path(__file__).resolve().parents[2]

GPU = types.SimpleNamespace(type="cuda")


@pytest.fixture
def gpu(monkeypatch):
    """What needs a GPU, replaced; the steps that were captured."""
    captured = []

    def peak_memory(step, device):
        step()
        return 3 << 20

    monkeypatch.setattr(measure, "make_clock", lambda device: measure.WallClock())
    monkeypatch.setattr(measure, "peak_memory", peak_memory)
    monkeypatch.setattr(measure, "count_launches", lambda step: 7)
    monkeypatch.setattr(measure, "capture", lambda step: captured.append(step) or step)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)
    return captured


def measured(plan, names, dtype="bfloat16", **fields):
    targets = {"cuda": {"eager": 1.5}, "cpu": {"peer": 2.0}}
    case = Case("c", fake_plan, targets, floor=2.5)
    work = groups.Measurement(case, plan, GPU, dtype, LIMITS)
    for _ in work.run(names, 0.01, **fields):
        pass
    return work


def test_on_cuda_launches_graphs_and_the_floor_count(gpu):
    plan = fake_plan(CPU, torch.bfloat16, "cuda")
    names = ("ours", "eager", "peer")
    work = measured(plan, names)
    assert work.reasons == {}
    ours, eager, peer = work.rows
    assert (ours["target"], eager["target"], peer["target"]) == (2.5, 1.5, None)
    assert (ours["launches"], eager["launches"]) == (7, None)
    assert ours["floor_ms"] == pytest.approx(8000 / 10.0 / 1e6 + 7 * 0.005)
    assert ours["peak_mib"] == 3.0
    assert len(gpu) == 2, "a peer is not captured, and ours once"
    assert ours["graph_ms"]["p50"] > 0
    assert (ours["graph_ratio"], peer["graph_ms"], peer["graph_ratio"]) == (None, None, None)
    assert eager["graph_ratio"] > 0
    assert peer["ratio"] > 0
    ours, *_ = measured(plan, names, "float32").rows
    assert ours["target"] is None, "the case's own dtype on cuda is bfloat16"


def test_ours_is_measured_on_each_backend_of_a_gpu(gpu, monkeypatch):
    """Beside the one that it chooses; where one cannot run the record says why."""
    built = []

    def build(device, dtype, backend):
        built.append((backend, torch.initial_seed()))
        if backend == "triton" and dtype == torch.float16:
            raise RuntimeError("not in halves")
        return fake_plan(CPU, dtype, backend or "cuda")

    case = Case("c", build, {})
    plan = build(GPU, torch.bfloat16, None)
    both = groups.with_backends(case, plan, groups.every_backend(GPU), GPU, torch.bfloat16)
    assert [*both.steps][:3] == ["ours", "ours_triton", "eager"]
    assert built[1:] == [("triton", 0)], "on inputs of the same seed, and not twice on cuda"
    work = measured(both, ("ours", "ours_triton", "eager"))
    backends = {row["contender"]: (row["backend"], row["launches"]) for row in work.rows}
    assert backends == {"ours": ("cuda", 7), "ours_triton": ("triton", 7), "eager": (None, None)}
    assert [row["contender"] for row in work.rows] == ["ours", "eager", "ours_triton"]
    assert work.rows[2]["ratio"] > 0
    assert work.rows[2]["graph_ratio"] > 0
    assert work.rows[2]["target"] is None
    halves = groups.with_backends(case, plan, groups.every_backend(GPU), GPU, torch.float16)
    assert halves.skipped["ours_triton"] == "RuntimeError: not in halves"
    monkeypatch.setattr(dispatch, "missing", lambda name, *_: f"no {name} here")
    none = groups.with_backends(case, plan, groups.every_backend(GPU), GPU, torch.bfloat16)
    assert none.skipped["ours_triton"] == "no triton here"
    assert none.steps.keys() == plan.steps.keys()
    assert groups.every_backend(CPU) == []


def test_a_device_that_is_lost_is_told_from_a_step_that_fails(gpu, monkeypatch):
    plan = fake_plan(CPU, torch.bfloat16, "cuda")
    assert measured(plan, ("ours", "broken")).reasons == {"broken": "ValueError: cannot"}

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    work = groups.Measurement(Case("c", fake_plan, {}), plan, GPU, "bfloat16", LIMITS)
    run_ = work.run(("ours", "eager", "peer", "broken"), 0.01)
    with pytest.raises(groups.Poisoned, match="cannot"):
        next(run_)
    assert work.reasons == {"broken": "ValueError: cannot"}


def test_a_run_whose_device_is_lost_goes_on_in_a_new_process(fake, tmp_path, monkeypatch):
    def broken():
        raise groups.Poisoned("illegal access")

    def poisoning(device, dtype, backend):
        plan = fake_plan(device, dtype, backend)
        plan.steps["built_once"] = broken
        return plan

    fake(fake_op(bad=Case("bad", poisoning, {}), good=Case("good", fake_plan, {})))
    started = []
    monkeypatch.setattr(groups, "check_alive", check_poisoned)
    monkeypatch.setattr(run.os, "execv", lambda program, words: started.append(words))
    assert go("--output", tmp_path, "--seconds", 1000) == 1
    ((_, _, module, *words),) = started
    assert module == "bench.run"
    assert "--missing" in words
    assert 900 < float(words[-1]) < 1000, "the seconds that are left"
    fake(fake_op(bad=Case("bad", fake_plan, {}), good=Case("good", fake_plan, {})))
    assert run.main(words) == 0
    first, second = read(tmp_path / "fake.json")["runs"]
    assert pairs(first) == {("bad", "ours"), ("bad", "eager")}
    assert ("bad", "built_once") not in pairs(second), "what lost the device is not tried again"
    assert ("bad", "peer") in pairs(second)
    assert ("good", "built_once") in pairs(second)


def check_poisoned(device, error):
    if isinstance(error, groups.Poisoned):
        raise error


def test_rows_are_in_the_record_before_the_next_contender_is_called(fake, tmp_path):
    """What torch.compile builds, and what is another package's, comes last and one by one."""
    seen = {}

    def watching(device, dtype, backend):
        plan = fake_plan(device, dtype, backend)

        def watched(name):
            def step():
                file = tmp_path / "fake.json"
                runs = read(file)["runs"] if file.exists() else [{"rows": []}]
                seen.setdefault(name, pairs(runs[-1]))

            return step

        steps = {name: watched(name) for name in ("built_once", "peer")}
        steps |= {name: plan.steps[name] for name in ("ours", "eager")}
        return Plan(steps, "reference", 1, 1, compiled=("built_once",), peers=("peer",))

    fake(fake_op(only=Case("only", watching, {})))
    assert go("--output", tmp_path) == 0
    first = {("only", "ours"), ("only", "eager")}
    assert seen == {"built_once": first, "peer": first | {("only", "built_once")}}
    (run_,) = read(tmp_path / "fake.json")["runs"]
    assert all(row["ratio"] > 0 for row in run_["rows"] if row["contender"] != "ours")


KILLED = """
import os, signal, sys, types, torch
from bench import measure, run
from bench.case import Case, Plan
from vicreg_kernels.core import dispatch
measure.ceilings = lambda device, dtype: {"copy_gbps": 10.0, "matmul_tflops": 0.1}
def build(device, dtype, backend):
    steps = dict.fromkeys(("ours", "eager"), lambda: sum(range(1000)))
    steps["built"] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    return Plan(steps, "reference", 1, 1, compiled=("built",))
module = types.ModuleType("bench.fake")
module.TITLE, module.CONTENDERS = "t", {"eager": "e", "built": "b"}
module.CASES = {"c": Case("c", build, {})}
sys.modules["bench.fake"] = module
run.OPS = ("fake",)
run.main(sys.argv[1:])
"""


def test_a_run_that_is_killed_leaves_what_it_measured(tmp_path):
    options = ["--device", "cpu", "--budget", "0.01", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    (record_,) = report.load([tmp_path])
    assert {row["contender"] for row in record_["runs"][0]["rows"]} == {"ours", "eager"}
    assert report.table(record_, record_["runs"][0])


def test_without_compiled_leaves_out_what_torch_compile_builds(fake, tmp_path):
    assert go("--without-compiled", "--output", tmp_path) == 0
    (run_,) = read(tmp_path / "fake.json")["runs"]
    names = {name for _, name in pairs(run_)}
    assert names == {"ours", "eager", "peer"}


def test_no_group_starts_once_the_seconds_are_over(fake, tmp_path, capsys, monkeypatch):
    now = itertools.count(0.0, 1.0)
    clock = types.SimpleNamespace(perf_counter=lambda: next(now))
    monkeypatch.setattr(groups, "time", clock)
    work = groups.Measurement(Case("c", fake_plan, {}), fake_plan(CPU, torch.float32, None), CPU,
                              "float32", LIMITS)  # fmt: skip
    for _ in work.run(("ours", "eager", "built_once", "peer"), 0.01, deadline=0.0):
        pass
    assert {row["contender"] for row in work.rows} == {"ours", "eager"}
    assert work.late == ["built_once", "peer"]


def test_a_run_measures_ours_on_the_backends_of_its_device(fake, tmp_path, monkeypatch, capsys):
    """And not where a step is of several ops, nor where the backend is named."""
    monkeypatch.setattr(groups, "every_backend", lambda device: ["ours_cpu", "ours_triton"])
    one = Case("one", fake_plan, {})
    fake(fake_op(one=one, several=Case("several", fake_plan, {}, each_backend=False)))
    assert go("--output", tmp_path, "--without-compiled") == 0
    record = read(tmp_path / "fake.json")
    assert [*record["contenders"]][:2] == ["ours_triton", "ours_cpu"]
    (run_,) = record["runs"]
    mine = {(r["case"], r["contender"], r["backend"]) for r in run_["rows"] if r["backend"]}
    assert mine == {("one", "ours", "reference"), ("one", "ours_cpu", "cpu"),
                    ("several", "ours", "reference")}  # fmt: skip
    reasons = {(s["case"], s["contender"]): s["reason"] for s in run_["skipped"]}
    assert "CUDA tensors" in reasons["one", "ours_triton"]
    assert ("several", "ours_triton") not in reasons
    table = report.table(record, run_).splitlines()
    (at,) = [i for i, line in enumerate(table) if line.startswith("case ")]
    assert table[at].split()[6:8] == ["ours", "eager"]
    assert table[at + 1].split()[0] == "cpu"
    assert go("--output", tmp_path / "named", "--backend", "cpu", "--without-compiled") == 0
    (run_,) = read(tmp_path / "named" / "fake.json")["runs"]
    assert {r["contender"] for r in run_["rows"]} == {"ours", "eager", "peer"}
