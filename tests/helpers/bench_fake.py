"""An op made up for the tests of the benchmarks: a sum of squares, with every kind of contender."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import measure, run
from bench.case import Case, Plan

CPU = torch.device("cpu")
PEAK_MEMORY = measure.peak_memory
LIMITS = {"copy_gbps": 10.0, "matmul_tflops": 0.1}


def fake_plan(device, dtype, backend) -> Plan:
    x = torch.ones(1000, dtype=dtype, device=device, requires_grad=True)
    step = measure.gradients(lambda z: z.square().sum(), x)

    def broken():
        raise ValueError("cannot\nat all")

    return Plan(
        {"ours": step, "eager": step, "built_once": step, "peer": step, "broken": broken},
        backend or "reference",
        least_bytes=8000,
        least_operations=2000,
        compiled=("built_once",),
        skipped={"absent": "is not installed"},
        peers=("peer",),
    )


def fake_op(**cases: Case) -> types.ModuleType:
    module = types.ModuleType("bench.fake")
    module.TITLE = "Sum of squares"
    names = ("eager", "built_once", "peer", "broken", "absent")
    module.CONTENDERS = {name: f"the {name} one" for name in names}
    module.CASES = cases or {
        "first": Case("first", fake_plan, {"cpu": {"eager": 1e-6, "peer": 1e6}}, quick=True),
        "second": Case("second", fake_plan, {"cpu": {"peer": 1e-6}}, quick=True),
        "gpu-only": Case("gpu-only", fake_plan, {}, {"cuda": ("bfloat16",)}, floor=2.0),
    }
    return module


@pytest.fixture(name="fake")
def fake_fixture(monkeypatch):
    """Installs an op's file in place of all; its ceilings are 10 GB/s and 0.1 TFLOP/s, and no
    profiler counts its memory.
    """

    def install(module: types.ModuleType) -> None:
        monkeypatch.setitem(sys.modules, "bench.fake", module)
        monkeypatch.setattr(run, "OPS", ("fake",))

    monkeypatch.setattr(measure, "ceilings", lambda device, dtype: LIMITS)
    monkeypatch.setattr(measure, "peak_memory", lambda step, device: (step(), 0)[1])
    install(fake_op())
    return install


def go(*options: object) -> int:
    return run.main(["--device", "cpu", "--budget", "0.01", *map(str, options)])


def pairs(run_: dict) -> set[tuple[str, str]]:
    return {(row["case"], row["contender"]) for row in run_["rows"]}


def read(path: Path) -> dict:
    return json.loads(path.read_text())
