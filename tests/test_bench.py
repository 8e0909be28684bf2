"""The benchmarks: right baselines, sound timing, a record that is as documented; and the CLI."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from shapes import randn
from tolerances import assert_close_to_truth, differentiate

import bench
from bench import environment, measure, report, run, vicreg, vicreg_baselines
from bench.case import Case, Plan
from vicreg_kernels import cli, dispatch, library

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
GROUPED = [(3, 5, 9), (3, 9, 9), (3, 12, 9)]
# The last two are computed in block rows.
PLAIN = [(13, 67), (67, 13), (12, 12), (530, 560), (560, 530)]


def views(*shape: int) -> list[torch.Tensor]:
    x = 0.9 * randn(*shape)
    return [x.requires_grad_(), (x + 0.4 * randn(*shape)).detach().requires_grad_()]


def hold_to_reference(loss, *shape: int) -> None:
    """Value and gradients of float32 against the library's reference in float64."""

    def reference(x, y):
        return vicreg.ours(x, y, backend="reference")

    x, y = views(*shape)
    truth = differentiate(reference, *(z.detach().double().requires_grad_() for z in (x, y)))
    plain, actual = differentiate(reference, x, y), differentiate(loss, x, y)
    for name, *each in (
        ("value", actual.values[0], truth.values[0], plain.values[0]),
        ("x", actual.gradients[0], truth.gradients[0], plain.gradients[0]),
        ("y", actual.gradients[1], truth.gradients[1], plain.gradients[1]),
    ):
        assert_close_to_truth(*each, torch.float32, max(shape), name)


@pytest.mark.parametrize("shape", PLAIN + GROUPED, ids=str)
@pytest.mark.parametrize("name", ["eager", "gram_plain", "gram_best"])
def test_baselines_compute_the_op(name, shape):
    hold_to_reference(vicreg_baselines.BASELINES[name](), *shape)


def test_best_gram_version_scales_by_the_incoming_gradient():
    x, y = views(20, 30)
    once = torch.autograd.grad(vicreg_baselines.gram_best(x, y), (x, y))
    thrice = torch.autograd.grad(3 * vicreg_baselines.gram_best(x, y), (x, y))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("name", vicreg_baselines.PEERS)
def test_peers_compute_the_op(name):
    try:
        loss = vicreg_baselines.BASELINES[name]()
    except ImportError as error:
        pytest.skip(str(error))
    hold_to_reference(loss, 13, 67)
    hold_to_reference(loss, 67, 13)


def test_a_missing_peer_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(vicreg_baselines.importlib.util, "find_spec", lambda name: None)
    plan = vicreg.plan(vicreg.Shape(24, 64), CPU, torch.float32, None)
    assert {"ours", "eager"} <= plan.steps.keys()
    assert "lightly" not in plan.steps
    assert plan.skipped["lightly"] == "lightly is not installed"


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


def test_least_work_of_vicreg():
    shape = vicreg.Shape(10, 100)
    assert shape.least_bytes(4) == 4 * 4 * 1000
    # a view: 10 * 11 * 100 for the symmetric product, 2 * 10 * 10 * 100 for the gradient
    assert shape.least_operations() == 2 * (11000 + 20000)
    assert vicreg.Shape(100, 10).least_operations() == shape.least_operations()
    assert vicreg.Shape(10, 100, groups=7).least_operations() == 7 * shape.least_operations()


@pytest.mark.parametrize("op", bench.OPS)
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


# An op made up for what follows: a sum of squares, with every kind of contender.


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


@pytest.fixture
def fake(monkeypatch):
    """Installs an op's file in place of all; its ceilings are 10 GB/s and 0.1 TFLOP/s."""

    def install(module: types.ModuleType) -> None:
        monkeypatch.setitem(sys.modules, "bench.fake", module)
        monkeypatch.setattr(run, "OPS", ("fake",))

    limits = {"copy_gbps": 10.0, "matmul_tflops": 0.1}
    monkeypatch.setattr(measure, "ceilings", lambda device, dtype: limits)
    install(fake_op())
    return install


def go(*options: object) -> int:
    return run.main(["--device", "cpu", "--budget", "0.01", *map(str, options)])


def pairs(run_: dict) -> set[tuple[str, str]]:
    return {(row["case"], row["contender"]) for row in run_["rows"]}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_the_record_is_as_documented(fake, tmp_path, monkeypatch):
    """Of two ops in one process, appended to once."""
    small = (vicreg.case(24, 64, cpu={"eager": 1e6}), vicreg.case(8, 8, groups=3))
    monkeypatch.setattr(vicreg, "CASES", {case.name: case for case in small})
    monkeypatch.setattr(run, "OPS", ("fake", "vicreg"))
    names = "ours,eager,gram_plain,gram_best,lightly"
    common = ["--contenders", names, "--output", tmp_path]
    assert go(*common, "--backend", "reference") == 0
    assert go(*common, "--op", "vicreg", "--cases", "24x64", "--dtype", "bfloat16", "--append") == 0
    documented = set(re.findall(r"`(\w+)`", (ROOT / "bench/results/README.md").read_text()))
    assert len(read(tmp_path / "fake.json")["runs"]) == 1
    record = read(tmp_path / "vicreg.json")
    assert (record["schema"], record["op"]) == (report.SCHEMA, "vicreg")
    assert record["title"] == vicreg.TITLE
    assert record["contenders"] == vicreg.CONTENDERS
    first, second = record["runs"]
    seen = {*record, *first, *first["device"], *first["host"], *first["versions"]}
    seen |= {*first["ceilings"]["float32"], *first["skipped"][0], *first["rows"][0]}
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


def test_on_cuda_launches_graphs_and_the_floor_count(monkeypatch):
    """measure_case with what needs a GPU replaced."""
    device = types.SimpleNamespace(type="cuda")
    captured = []
    monkeypatch.setattr(measure, "make_clock", lambda device: measure.WallClock())
    monkeypatch.setattr(measure, "peak_memory", lambda step, device: 3 << 20)
    monkeypatch.setattr(measure, "count_launches", lambda step: 7)
    monkeypatch.setattr(measure, "capture", lambda step: captured.append(step) or step)
    plan = fake_plan(CPU, torch.bfloat16, "cuda")
    case = Case("c", fake_plan, {"cuda": {"eager": 1.5}, "cpu": {"peer": 2.0}}, floor=2.5)
    names = ("ours", "eager", "peer")
    limits = {"copy_gbps": 10.0, "matmul_tflops": 0.1}
    rows, reasons = run.measure_case(case, plan, names, device, "bfloat16", 0.01, limits)
    assert reasons == {}
    ours, eager, peer = rows
    assert (ours["target"], eager["target"], peer["target"]) == (2.5, 1.5, None)
    assert (ours["launches"], eager["launches"]) == (7, None)
    assert ours["floor_ms"] == pytest.approx(8000 / 10.0 / 1e6 + 7 * 0.005)
    assert ours["peak_mib"] == 3.0
    assert len(captured) == 2, "a peer is not captured"
    assert ours["graph_ms"]["p50"] > 0
    assert (ours["graph_ratio"], peer["graph_ms"], peer["graph_ratio"]) == (None, None, None)
    assert eager["graph_ratio"] > 0
    (ours, *_), _ = run.measure_case(case, plan, names, device, "float32", 0.01, limits)
    assert ours["target"] is None, "the case's own dtype on cuda is bfloat16"


def test_missing_measures_what_the_record_lacks(fake, tmp_path, capsys):
    assert go("--cases", "second", "--output", tmp_path) == 0
    assert go("--missing", "--output", tmp_path) == 0
    assert go("--missing", "--output", tmp_path) == 0
    first, second = read(tmp_path / "fake.json")["runs"]
    assert {case for case, _ in pairs(first)} == {"second"}
    assert {case for case, _ in pairs(second)} == {"first"}
    assert "fake: nothing to measure" in capsys.readouterr().out


def test_no_case_starts_once_the_seconds_are_over(fake, tmp_path, capsys):
    assert go("--seconds", "1e-9", "--output", tmp_path) == 0
    assert "no time left for: first float32, second float32" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_selection_writes_only_where_told(fake, monkeypatch):
    written = []
    monkeypatch.setattr(run, "write", lambda path, record: written.append(path))
    for option in (["--cases", "first"], ["--quick"], ["--backend", "reference"]):
        assert go(*option, "--contenders", "ours,eager") == 0
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


def made_up(ratio: float, device: str = "cpu") -> dict:
    """A record of vicreg's first case, ours at 10 ms and ten times its floor."""
    case = vicreg.CASES["256x8192"]
    row = {"case": case.name, "dtype": "float32", "backend": None, "rounds": 5}
    row |= {"graph_ms": None, "graph_ratio": None, "peak_mib": 12345.6, "floor_ms": 1.0}

    def row_of(name: str, p50: float, target: float | None) -> dict:
        ratio = None if name == "ours" else p50 / 10
        times = {"p20": p50, "p50": p50, "p80": p50}
        return {**row, "contender": name, "ms": times, "ratio": ratio, "target": target}

    rows = [row_of("ours", 10.0, case.floor if device == "cuda" else None)]
    rows[0]["backend"] = "reference"
    for name in vicreg.CONTENDERS:
        rows.append(row_of(name, 10 * ratio, case.targets[device].get(name)))
    run_ = {
        "date": "2026-01-02T03:04:05+00:00",
        "device": {"type": device, "name": "Device " + "x" * 40},
        "threads": 2,
        "versions": {"torch": "2.13.0+cpu", "cuda": "13.0"},
        "ceilings": {"float32": {"copy_gbps": 12345.0, "matmul_tflops": 1234.5}},
        "rows": rows,
        "skipped": [],
    }
    return {
        "schema": report.SCHEMA,
        "op": "vicreg",
        "title": vicreg.TITLE,
        "contenders": vicreg.CONTENDERS,
        "runs": [run_],
    }


def text_of(record: dict) -> str:
    text = report.table(record, record["runs"][0])
    assert max(map(len, text.splitlines())) <= 116
    return text


def test_the_table_marks_targets_and_fits():
    reached, missed = text_of(made_up(1234.5)), text_of(made_up(1.2))
    assert reached.startswith(vicreg.TITLE)
    assert "1234x*" in reached
    assert "missed:" not in reached
    assert "1.20x!" in missed
    assert "missed: 256x8192 float32: 1.20x eager, target 110x" in missed
    assert "missed: 256x8192 float32: 1.20x gram_plain, target 1.25x" in missed
    assert "10.0x its floor, target 2.5x" in text_of(made_up(99.0, "cuda"))
    assert "as graph" not in reached


def test_graph_replays_have_their_own_line():
    record = made_up(1.2, "cuda")
    for row in record["runs"][0]["rows"]:
        row["graph_ms"] = {"p20": 2.0, "p50": 2.0, "p80": 2.0}
        row["graph_ratio"] = None if row["contender"] == "ours" else 77.0
    text = text_of(record)
    (line,) = [line for line in text.splitlines() if "as graph" in line]
    assert line.split()[4:7] == ["2", "12346", "50"]
    assert line.count("77.0x*") == 3, "its targets are those of eager, compiled and gram_best"
    assert "2.0x its floor" not in text, "the better of the two times is held to the floor"


def test_a_table_has_the_contenders_that_its_run_holds():
    record = made_up(3.0)
    kept = ("ours", "gram_plain")
    rows = record["runs"][0]["rows"]
    record["runs"][0]["rows"] = [row for row in rows if row["contender"] in kept]
    lines = text_of(record).splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("case ")]
    assert lines[at].split() == ["case", "dtype", "ours", "ms", "MiB", "floor%", "gram"]
    assert lines[at + 1].split() == ["plain"]


def test_the_report_reads_files_and_folders(tmp_path, capsys):
    file = tmp_path / "some-device" / "vicreg.json"
    file.parent.mkdir()
    file.write_text(json.dumps(made_up(200.0)))
    assert report.main([str(tmp_path)]) == 0
    assert "200x*" in capsys.readouterr().out
    assert report.main([str(file)]) == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    assert report.main([str(empty)]) == 1
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "nowhere")])
    (empty / "other.json").write_text(json.dumps(made_up(3.0) | {"schema": "of old"}))
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert "schema 'of old'" in capsys.readouterr().err


def test_the_committed_records_are_read(capsys):
    assert report.main([]) == 0
    shown = capsys.readouterr().out
    for record in report.load([report.RESULTS]):
        assert record["title"] in shown


def test_the_report_and_the_gpu_command_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; import bench.gpu; print(bench.report.main([]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("\n0\n"), done.stderr


def test_the_figure_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("matplotlib.image")
    from bench.figure import draw

    draw(made_up(200.0), tmp_path / "docs" / "speed.png")
    pixels = image.imread(tmp_path / "docs" / "speed.png")
    assert pixels.shape[1] > 1000
    assert len({tuple(p) for p in (pixels[::4, ::4, :3] * 8).round().reshape(-1, 3)}) > 8
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(made_up(3.0)))
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--figure", str(tmp_path / "x.png")])
    assert "one record, here are 2" in capsys.readouterr().err


def test_slug():
    assert environment.slug("NVIDIA H200") == "nvidia-h200"
    assert (
        environment.slug("CPU Intel(R) Xeon(R) @ 2.0GHz 4 cores") == "cpu-intel-xeon-2-0ghz-4-cores"
    )


def test_info_says_which_backend_runs(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0] == "cpu"
    by_dtype = found["backends"]["vicreg"]["cpu"]
    assert by_dtype["float64"] == "reference"
    assert by_dtype["float32"] == dispatch.choose("vicreg", None, "cpu", torch.float32)
    assert found["libraries"]["_C (cpu)"] == (library.CPU_MISSING or "loaded")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^  vicreg +cpu +float32 +{by_dtype['float32']}$", text, re.MULTILINE)


def test_info_without_libraries_says_pure_python(monkeypatch, capsys):
    monkeypatch.setattr(library, "CPU_MISSING", "no compiler was there")
    monkeypatch.setattr(library, "CUDA_MISSING", "no nvcc was there")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "pure Python" in text
    assert "no compiler was there" in text
    assert re.search(r"vicreg +cpu +float32 +reference", text)


def test_info_names_the_environments_backend(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "ENVIRONMENT_BACKEND", "cuda")
    monkeypatch.setattr(library, "CUDA_MISSING", "no nvcc was there")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "VICREG_KERNELS_BACKEND=cuda" in text
    assert re.search(r"float32 +none: .*no nvcc was there", text)


@pytest.mark.parametrize("command", ["bench", "audit", "report"])
def test_commands_of_a_checkout_say_when_there_is_none(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    assert cli.main([command]) == 2
    assert "source checkout" in capsys.readouterr().err


def test_commands_pass_their_options_on(monkeypatch):
    ran = []

    def fake(command, cwd):
        ran.append(command[1:])
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(cli.subprocess, "run", fake)
    assert cli.main(["bench"]) == 5
    cli.main(["bench", "--cases", "64x8192"])
    cli.main(["report", "some.json", "--figure", "x.png"])
    assert ran == [
        ["-m", "bench.run", "--quick"],
        ["-m", "bench.run", "--cases", "64x8192"],
        ["-m", "bench.report", "some.json", "--figure", "x.png"],
    ]
    with pytest.raises(SystemExit):
        cli.main(["info", "--surplus"])


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "vicreg_kernels.cli", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == cli.__version__
