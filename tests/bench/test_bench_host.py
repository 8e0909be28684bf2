"""The benchmark of the host's share: its cases run, and the clock stops when a call returns."""

from __future__ import annotations

import json
import types

import pytest
import torch

import bench
from bench import ema, host, measure, report, run
from bench.case import Case, Plan

CPU = torch.device("cpu")


def test_it_is_measured_with_the_others():
    assert "host" in bench.ALL
    assert all({"cpu", "cuda"} <= case.dtypes.keys() for case in host.CASES.values())


@pytest.mark.parametrize("name", host.CASES)
def test_contenders_do_the_same_work(name):
    """Results of the same shapes; the ops' own tests hold the values."""
    torch.manual_seed(0)
    plan = host.CASES[name].build(CPU, torch.float32, None)
    assert plan.host
    peers = [step for key, step in plan.steps.items() if key not in ("ours", *plan.compiled)]
    assert peers
    ours = plan.steps["ours"]()
    for peer in peers:
        other = peer()
        if ours is None:
            assert other is None
        else:
            assert [x.shape for x in ours] == [x.shape for x in other]
            assert all(x.isfinite().all() for x in (*ours, *other))


@pytest.mark.parametrize(("model", "count"), [("vit_b", 149), ("vit_l", 293)])
def test_the_tiny_models_have_the_tensors_of_the_real_ones(model, count):
    real = ema.parameter_shapes(*ema.MODELS[model])
    tiny = [tuple(p.shape) for p in host.TinyVision(ema.MODELS[model][1]).parameters()]
    assert len(real) == len(tiny) == count
    assert sorted(map(len, real)) == sorted(map(len, tiny))
    assert sum(p.numel() for p in host.TinyVision(12).parameters()) < 10_000


def test_the_clock_does_not_wait_for_the_device(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    clock = measure.HostClock(types.SimpleNamespace(type="cuda"))
    assert clock(lambda: calls.append("step")) >= 0
    assert calls == ["synchronize", "step"]
    calls.clear()
    measure.HostClock(CPU)(lambda: calls.append("step"))
    assert calls == ["step"]


@pytest.mark.parametrize(("most", "missed"), [(1e-9, True), (1e9, False), (None, False)])
def test_a_limit_in_milliseconds(most, missed, monkeypatch, tmp_path):
    """A record says what it was, and the table what was missed."""

    def build(device, dtype, backend):
        return Plan({"ours": lambda: 1}, "cpu", 0, 0, host=True)

    monkeypatch.setattr(host, "CASES", {"one": Case("one", build, {}, most_ms=most)})
    limits = {"copy_gbps": 10.0, "matmul_tflops": 0.1}
    monkeypatch.setattr(measure, "ceilings", lambda device, dtype: limits)
    command = ["--device", "cpu", "--op", "host", "--budget", "0.01", "--output", str(tmp_path)]
    assert run.main(command) == 0
    (record,) = json.loads((tmp_path / "host.json").read_text())["runs"]
    assert record["rows"][0]["most_ms"] == most
    lines = [line for line in report.remarks(record) if line.startswith("missed: one float32")]
    assert bool(lines) == missed
    assert not missed or lines[0].endswith("ms, at most 1e-09 ms")
