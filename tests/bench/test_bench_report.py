"""The tables and the chart of the benchmark records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report, vicreg

ROOT = Path(__file__).resolve().parents[2]


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
    code = "import sys; sys.modules['torch'] = None; import bench.gpu, bench.report as report; "
    code += "print(report.main([]))"
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
    for op in ("vicreg", "barlow"):
        (tmp_path / f"{op}.json").write_text(json.dumps(made_up(3.0) | {"op": op}))
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--figure", str(tmp_path / "x.png")])
    assert "one record, here are 2" in capsys.readouterr().err
