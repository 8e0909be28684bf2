"""The benchmarks: right baselines, sound timing, a record that is as documented; and the CLI."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shapes import randn
from tolerances import assert_close_to_truth, differentiate

from bench import baselines, environment, measure, report, run
from bench.cases import CASES, TARGETS, Case
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
        return run.ours(x, y, backend="reference")

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
    hold_to_reference(baselines.BASELINES[name](), *shape)


def test_best_gram_version_scales_by_the_incoming_gradient():
    x, y = views(20, 30)
    once = torch.autograd.grad(baselines.gram_best(x, y), (x, y))
    thrice = torch.autograd.grad(3 * baselines.gram_best(x, y), (x, y))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("name", baselines.PEERS)
def test_peers_compute_the_op(name):
    try:
        loss = baselines.BASELINES[name]()
    except ImportError as error:
        pytest.skip(str(error))
    hold_to_reference(loss, 13, 67)
    hold_to_reference(loss, 67, 13)


def test_a_missing_peer_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    losses, skipped = run.build(["ours", "lightly"], CASES["256x2048"], None)
    assert list(losses) == ["ours"]
    assert skipped == {"lightly": "lightly is not installed"}


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

    steps = {"a": step("a", 900.0), "b": step("b", 45.0), "c": step("c", 3600.0)}
    estimates = {"a": 0.9, "b": 0.045, "c": 3.6}
    samples = measure.interleave(steps, clock, 9.0, estimates, {"c": 1})
    assert {name: len(s) for name, s in samples.items()} == dict.fromkeys("abc", 25)
    took = {name: [t for t in s if t is not None] for name, s in samples.items()}
    assert took == {"a": [900.0] * 3, "b": [45.0] * 25, "c": [3600.0]}
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


def test_least_work():
    case = Case(10, 100)
    assert case.least_bytes(4) == 4 * 4 * 1000
    # a view: 10 * 11 * 100 for the symmetric product, 2 * 10 * 10 * 100 for the gradient
    assert case.least_operations() == 2 * (11000 + 20000)
    assert Case(100, 10).least_operations() == case.least_operations()
    assert Case(10, 100, groups=7).least_operations() == 7 * case.least_operations()


def test_names_and_targets_agree():
    for name, case in CASES.items():
        assert "x".join(map(str, case.shape)) == name
    for by_shape in TARGETS.values():
        assert by_shape.keys() <= CASES.keys()
        assert {n for t in by_shape.values() for n in t} <= baselines.BASELINES.keys()
    assert report.BASELINES.keys() == baselines.BASELINES.keys()


SMALL = {"24x64": Case(24, 64), "64x24": Case(64, 24), "3x8x8": Case(8, 8, groups=3)}
NAMES = "ours,eager,gram_plain,gram_best,lightly"


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The file of a run over small shapes, appended to once."""
    path = tmp_path_factory.mktemp("bench") / "vicreg.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CASES", SMALL)
        limits = {"copy_gbps": 10.0, "matmul_tflops": 0.1}
        patch.setattr(measure, "ceilings", lambda device, dtype: limits)
        command = ["--device", "cpu", "--contenders", NAMES, "--budget", "0.2"]
        command += ["--output", str(path)]
        assert run.main([*command, "--backend", "reference"]) == 0
        more = ["--shapes", "24x64", "--dtype", "bfloat16", "--append"]
        assert run.main([*command, *more]) == 0
    return json.loads(path.read_text())


def test_the_record_is_as_documented(record):
    readme = (ROOT / "bench" / "results" / "README.md").read_text()
    documented = set(re.findall(r"`(\w+)`", readme))
    assert record["schema"] == "vicreg-kernels/bench/1"
    first, second = record["runs"]
    seen = {*record, *first, *first["device"], *first["host"], *first["versions"]}
    seen |= {*first["ceilings"]["float32"], *first["skipped"][0], *first["rows"][0]}
    assert seen <= documented, f"undocumented: {seen - documented}"
    assert {row["shape"] for row in first["rows"]} == set(SMALL)
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
        # both gradients are the least a step leaves behind
        case = SMALL[row["shape"]]
        assert row["peak_mib"] >= 2 * case.elements() * 4 / 2**20
        longer = max(case.least_bytes(4) / 10.0 / 1e6, case.least_operations() / 0.1 / 1e9)
        assert row["floor_ms"] == pytest.approx(longer)
        assert row["percent_of_floor"] == pytest.approx(100 * longer / row["ms"]["p50"])
    skipped = {(s["shape"], s["contender"]) for s in first["skipped"]}
    assert ("3x8x8", "lightly") in skipped


def test_a_selection_writes_only_where_told(monkeypatch, capsys):
    written = []
    monkeypatch.setattr(run, "CASES", SMALL)
    monkeypatch.setattr(run, "write", lambda path, *rest: written.append(path))
    monkeypatch.setattr(measure, "ceilings", lambda *a: {"copy_gbps": 1.0, "matmul_tflops": 1.0})
    monkeypatch.setattr(run, "BASELINES", {"eager": lambda: baselines.eager})
    assert run.main(["--device", "cpu", "--shapes", "24x64", "--budget", "0.01"]) == 0
    assert written == []
    assert run.main(["--device", "cpu", "--budget", "0.01"]) == 0
    assert set(written) == {environment.default_folder(CPU) / "vicreg.json"}


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--shapes", "7x7", "256x8192"),
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
    """A run with one shape that has targets; ours at 10 ms."""
    row = {"shape": "256x8192", "dtype": "float32", "backend": None, "rounds": 5}
    row |= {"graph_ms": None, "graph_ratio": None, "peak_mib": 12345.6, "floor_ms": 1.0}
    row |= {"percent_of_floor": 10.0, "percent_of_ceiling": 10.0, "launches": None}

    def times(p50: float) -> dict:
        return {"p20": p50, "p50": p50, "p80": p50}

    rows = [{**row, "contender": "ours", "backend": "reference", "ms": times(10.0), "ratio": None}]
    for name in report.BASELINES:
        rows.append({**row, "contender": name, "ms": times(10 * ratio), "ratio": ratio})
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "device": {"type": device, "name": "Device " + "x" * 40},
        "threads": 2,
        "versions": {"torch": "2.13.0+cpu", "cuda": "13.0"},
        "ceilings": {"float32": {"copy_gbps": 12345.0, "matmul_tflops": 1234.5}},
        "rows": rows,
        "skipped": [],
    }


def test_the_table_marks_targets_and_fits():
    reached, missed = report.table(made_up(1234.5)), report.table(made_up(1.2))
    assert "1234x*" in reached
    assert "missed:" not in reached
    assert "1.20x!" in missed
    assert "missed: 256x8192 float32: 1.20x eager, target 110x" in missed
    assert "missed: 256x8192 float32: 1.20x gram_plain, target 1.25x" in missed
    for text in (reached, missed):
        assert max(map(len, text.splitlines())) <= report.WIDTH
    assert "10.0x its floor, target 2.5x" in report.table(made_up(99.0, "cuda"))
    assert "as graph" not in reached


def test_graph_replays_have_their_own_line():
    run_ = made_up(1.2, "cuda")
    for row in run_["rows"]:
        row["graph_ms"] = {"p20": 2.0, "p50": 2.0, "p80": 2.0}
        row["graph_ratio"] = None if row["contender"] == "ours" else 77.0
    text = report.table(run_)
    assert max(map(len, text.splitlines())) <= report.WIDTH
    (line,) = [line for line in text.splitlines() if "as graph" in line]
    assert line.split()[4:7] == ["2", "12346", "50"]
    assert line.count("77.0x*") == 3, "its targets are those of eager, compiled and gram_best"
    assert "2.0x its floor" not in text, "the better of the two times is held to the floor"


def test_the_report_reads_files_and_folders(tmp_path, capsys):
    file = tmp_path / "some-device" / "vicreg.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"schema": "s", "op": "vicreg", "runs": [made_up(200.0)]}))
    assert report.main([str(tmp_path)]) == 0
    assert "200x*" in capsys.readouterr().out
    assert report.main([str(tmp_path / "some-device" / "vicreg.json")]) == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    assert report.main([str(empty)]) == 1
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "nowhere")])


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("matplotlib.image")
    from bench.figure import draw

    draw(made_up(200.0), tmp_path / "docs" / "speed.png")
    pixels = image.imread(tmp_path / "docs" / "speed.png")
    assert pixels.shape[1] > 1000
    assert len({tuple(p) for p in (pixels[::4, ::4, :3] * 8).round().reshape(-1, 3)}) > 8


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
    cli.main(["bench", "--shapes", "64x8192"])
    cli.main(["report", "some.json", "--figure", "x.png"])
    assert ran == [
        ["-m", "bench.run", "--quick"],
        ["-m", "bench.run", "--shapes", "64x8192"],
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
