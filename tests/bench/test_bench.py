"""The benchmark runner: sound timing, what is measured when, a record that is as documented."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

import bench
from bench import environment, measure, record, report, run, vicreg
from bench.case import Case, Plan
from tests.helpers.bench_fake import (  # noqa: F401
    CPU,
    PEAK_MEMORY,
    fake_fixture,
    fake_op,
    fake_plan,
    go,
    pairs,
    read,
)

ROOT = Path(__file__).resolve().parents[2]


def test_turns_rotate_and_slow_steps_sit_rounds_out():
    now, calls = [0.0], []

    def clock(step):
        before = now[0]
        step()
        return now[0] - before

    def step(name, milliseconds):
        def called():
            calls.append(name)
            now[0] += milliseconds

        return called

    steps = {"a": step("a", 900.0), "b": step("b", 45.0), "c": step("c", 7200.0)}
    estimates = {"a": 0.9, "b": 0.045, "c": 7.2}
    samples = measure.interleave(steps, clock, 9.0, estimates)
    assert {name: len(s) for name, s in samples.items()} == dict.fromkeys("abc", 25)
    took = {name: [t for t in s if t is not None] for name, s in samples.items()}
    assert took == {"a": [900.0] * 3, "b": [45.0] * 25, "c": [7200.0]}
    # b: an untimed call and a timed one a turn; the slow ones are called once
    assert (calls.count("a"), calls.count("b"), calls.count("c")) == (3, 50, 1)
    inside = [i for i, t in enumerate(samples["a"]) if t is not None]
    assert min(b - a for a, b in itertools.pairwise(inside)) >= 8, "spread over the run"
    assert measure.ratio(samples["a"], samples["b"]) == 20.0

    calls.clear()
    quick = {name: step(name, 100.0) for name in "xyz"}
    measure.interleave(quick, clock, 1.2, dict.fromkeys("xyz", 0.1))
    assert "".join(calls[::2]) == "xyzyzx"


def test_ratio_is_the_median_of_the_rounds_own_ratios():
    ours = [1.0, 2.0, 4.0, None]
    other = [3.0, 8.0, 20.0, 7.0]
    assert measure.ratio(other, ours) == 4.0
    assert measure.ratio([None, None, None, 1.0], ours) is None


def test_spread():
    assert measure.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == measure.Spread(2.0, 3.5, 5.0)
    assert measure.Spread.of([2.0]) == measure.Spread(2.0, 2.0, 2.0)


def test_peak_memory_counts_what_lives_at_once():
    kept = torch.ones(1000)

    def step():
        a = torch.empty(1 << 20, dtype=torch.int8)
        b = torch.empty(1 << 20, dtype=torch.int8)
        del a, b
        return torch.empty(1 << 19, dtype=torch.int8), kept

    assert measure.peak_memory(step, CPU) == 2 << 20


@pytest.mark.parametrize("op", bench.ALL)
def test_an_ops_file_gives_what_the_runner_takes(op):
    module = run.import_module(f"bench.{op}")
    assert module.TITLE
    assert "ours" not in module.CONTENDERS
    assert any(case.quick and "cpu" in case.dtypes for case in module.CASES.values())
    for name, case in module.CASES.items():
        assert case.name == name
        assert case.dtypes.keys() | case.targets.keys() <= {"cpu", "cuda"}
        assert {dtype for each in case.dtypes.values() for dtype in each} <= set(run.DTYPES)
        assert {n for each in case.targets.values() for n in each} <= module.CONTENDERS.keys()


def test_the_record_is_as_documented(fake, tmp_path, monkeypatch):
    """Of two ops in one process, appended to once."""
    monkeypatch.setattr(measure, "peak_memory", PEAK_MEMORY)
    small = (vicreg.case(24, 64, cpu={"eager": 1e6}), vicreg.case(8, 8, groups=3))
    monkeypatch.setattr(vicreg, "CASES", {case.name: case for case in small})
    monkeypatch.setattr(run, "OPS", ("fake", "vicreg"))
    names = "ours,eager,gram_plain,gram_best,lightly"
    common = ["--contenders", names, "--output", tmp_path]
    assert go(*common, "--backend", "reference") == 0
    assert go(*common, "--op", "vicreg", "--cases", "24x64", "--dtype", "bfloat16", "--append") == 0
    documented = set(re.findall(r"`(\w+)`", (ROOT / "bench/results/README.md").read_text()))
    assert len(read(tmp_path / "fake.json")["runs"]) == 1
    record_ = read(tmp_path / "vicreg.json")
    assert (record_["schema"], record_["op"]) == (report.SCHEMA, "vicreg")
    assert record_["title"] == vicreg.TITLE
    assert record_["contenders"] == vicreg.CONTENDERS
    first, second = record_["runs"]
    seen = {*record_, *first, *first["device"], *first["host"], *first["versions"]}
    seen |= {*first["ceilings"]["float32"], *first["skipped"][0], *first["rows"][0]}
    seen |= {*first["planned"][0]}
    assert seen <= documented, f"undocumented: {seen - documented}"
    assert report.SCHEMA in (ROOT / "bench/results/README.md").read_text()
    assert {row["case"] for row in first["rows"]} == {"24x64", "3x8x8"}
    assert {row["dtype"] for row in second["rows"]} == {"bfloat16"}
    assert "--backend reference" in first["command"]
    assert first["threads"] == torch.get_num_threads()
    assert first["versions"]["torch"] == torch.__version__
    for row in first["rows"]:
        assert row.keys() == first["rows"][0].keys()
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        assert row["rounds"] >= 1
        assert (row["backend"] == "reference") == (row["contender"] == "ours")
        assert (row["ratio"] is None) == (row["contender"] == "ours")
        targeted = (row["case"], row["contender"]) == ("24x64", "eager")
        assert row["target"] == (1e6 if targeted else None)
        # both gradients are the least a step leaves behind
        shape = vicreg.Shape(24, 64) if row["case"] == "24x64" else vicreg.Shape(8, 8, groups=3)
        assert row["peak_mib"] >= 2 * shape.elements() * 4 / 2**20
        longer = max(shape.least_bytes(4) / 10.0 / 1e6, shape.least_operations() / 0.1 / 1e9)
        assert row["floor_ms"] == pytest.approx(longer)
        assert row["percent_of_floor"] == pytest.approx(100 * longer / row["ms"]["p50"])
    assert all(row["target"] is None for row in second["rows"]), "targets are float32's"
    assert ("3x8x8", "lightly") in {(s["case"], s["contender"]) for s in first["skipped"]}


def test_what_fails_is_said_and_stops_nothing(fake, tmp_path, capsys):
    def unbuilt(device, dtype, backend):
        raise RuntimeError("no such backend")

    def undeclared(device, dtype, backend):
        return Plan({"ours": int, "hers": int}, "reference", 1, 0)

    def failing(device, dtype, backend):
        plan = fake_plan(device, dtype, backend)
        plan.steps["ours"] = plan.steps["broken"]
        return plan

    fake(
        fake_op(
            unbuilt=Case("unbuilt", unbuilt, {}),
            undeclared=Case("undeclared", undeclared, {}),
            failing=Case("failing", failing, {}),
            whole=Case("whole", fake_plan, {}),
        )
    )
    assert go("--output", tmp_path) == 1, "ours failed"
    (run_,) = read(tmp_path / "fake.json")["runs"]
    whole = {("whole", name) for name in ("ours", "eager", "built_once", "peer")}
    assert pairs(run_) - whole == {("failing", name) for _, name in whole} - {("failing", "ours")}
    assert all(r["ratio"] is None for r in run_["rows"] if r["case"] == "failing")
    reasons = {(s["case"], s["contender"]): s["reason"] for s in run_["skipped"]}
    assert reasons["unbuilt", "ours"] == "RuntimeError: no such backend"
    assert "hers not in CONTENDERS" in reasons["undeclared", "ours"]
    assert reasons["failing", "ours"] == "ValueError: cannot"
    assert reasons["whole", "broken"] == "ValueError: cannot"
    assert reasons["whole", "absent"] == "is not installed"
    shown = capsys.readouterr()
    assert "left out: absent at failing, whole: is not installed" in shown.out
    assert "no such backend" in shown.err
    fake(fake_op())
    assert go("--output", tmp_path / "again") == 0


def test_a_lean_run_measures_costly_contenders_where_they_count(fake, tmp_path):
    assert go("--lean", "--output", tmp_path) == 0
    (run_,) = read(tmp_path / "fake.json")["runs"]
    all_ = {"ours", "eager", "built_once", "peer"}
    assert pairs(run_) == {("first", n) for n in all_} | {
        ("second", n) for n in all_ - {"built_once"}
    }
    targets = {(r["case"], r["contender"]): r["target"] for r in run_["rows"]}
    assert {k: t for k, t in targets.items() if t} == {
        ("first", "eager"): 1e-6,
        ("first", "peer"): 1e6,
        ("second", "peer"): 1e-6,
    }
    assert report.remarks(run_)[-1].startswith("missed: first float32: ")


def test_missing_measures_what_the_record_lacks(fake, tmp_path, capsys):
    assert go("--cases", "second", "--output", tmp_path) == 0
    assert go("--missing", "--output", tmp_path) == 0
    assert go("--missing", "--output", tmp_path) == 0
    first, second = read(tmp_path / "fake.json")["runs"]
    assert {case for case, _ in pairs(first)} == {"second"}
    assert {case for case, _ in pairs(second)} == {"first"}
    assert "fake: nothing to measure" in capsys.readouterr().out


def test_missing_measures_the_contenders_that_a_case_lacks(fake, tmp_path, capsys):
    """Beside ours again, for the ratio; what failed before is not tried anew."""
    tried = []

    def build(device, dtype, backend):
        plan = fake_plan(device, dtype, backend)

        def broken():
            tried.append(1)
            raise ValueError("cannot")

        plan.steps["broken"] = broken
        return plan

    fake(fake_op(only=Case("only", build, {})))
    assert go("--without-compiled", "--output", tmp_path) == 0
    assert go("--missing", "--without-compiled", "--output", tmp_path) == 0
    assert "fake: nothing to measure" in capsys.readouterr().out
    assert go("--missing", "--output", tmp_path) == 0
    first, second = read(tmp_path / "fake.json")["runs"]
    assert pairs(first) == {("only", "ours"), ("only", "eager"), ("only", "peer")}
    assert pairs(second) == {("only", "ours"), ("only", "built_once")}
    assert second["skipped"] == []
    assert len(tried) == 1
    (built,) = [row for row in second["rows"] if row["contender"] == "built_once"]
    assert built["ratio"] > 0


def test_missing_adds_to_a_record_of_the_schema_before(fake, tmp_path):
    assert go("--contenders", "ours,eager", "--output", tmp_path) == 0
    path = tmp_path / "fake.json"
    old = read(path)
    old["schema"] = "vicreg-kernels/bench/2"
    del old["runs"][0]["planned"]
    path.write_text(json.dumps(old))
    assert go("--missing", "--output", tmp_path) == 0
    assert read(path)["schema"] == report.SCHEMA
    _, second = read(path)["runs"]
    assert pairs(second) == {
        (case, name) for case in ("first", "second") for name in ("ours", "built_once", "peer")
    }


def test_no_case_starts_once_the_seconds_are_over(fake, tmp_path, capsys):
    assert go("--seconds", "1e-9", "--output", tmp_path) == 0
    assert "no time left for: first float32, second float32" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_selection_writes_only_where_told(fake, monkeypatch):
    written = []
    monkeypatch.setattr(record, "write", lambda path, record: written.append(path))
    for option in (
        "--cases first",
        "--quick",
        "--lean",
        "--without-compiled",
        "--dtype float32",
        "--contenders ours",
        "--backend reference",
        "--seconds 60",
    ):
        assert go(*option.split()) == 0
    assert written == []
    assert go("--op", "fake") == 0
    assert set(written) == {environment.default_folder(CPU) / "fake.json"}


def test_a_case_of_another_device_is_measured_when_named(fake, tmp_path):
    assert go("--cases", "gpu-only", "--output", tmp_path) == 0
    (run_,) = read(tmp_path / "fake.json")["runs"]
    assert {row["case"] for row in run_["rows"]} == {"gpu-only"}
    assert all(row["target"] is None for row in run_["rows"])


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--op", "losses", "vicreg"),
        ("--cases", "7x7", "256x8192"),
        ("--contenders", "hers", "gram_best"),
        ("--dtype", "int8", "float32"),
    ],
)
def test_an_unknown_name_is_an_error_that_lists_the_known(option, value, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.parse([option, value])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert repr(value) in message
    assert named in message


def test_a_run_without_its_gpu_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert run.main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_slug():
    assert environment.slug("NVIDIA H200") == "nvidia-h200"
    assert (
        environment.slug("CPU Intel(R) Xeon(R) @ 2.0GHz 4 cores") == "cpu-intel-xeon-2-0ghz-4-cores"
    )
