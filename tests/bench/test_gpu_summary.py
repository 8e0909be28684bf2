"""What `make gpu` brings home: the summary says the verdicts first and stays short, the archive
fits.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from bench import gpu_summary
from bench.stages import FAIL, NOT_REACHED, PASS, SKIPPED, Result, Stage, Verdict

BUILD, TESTS, TRAINER = Stage("build"), Stage("parity"), Stage("trainer")
STAGES = [BUILD, TESTS, TRAINER]


def row(contender: str, ms: float, **more: object) -> dict[str, object]:
    head = {"case": "256x8192", "dtype": "bfloat16", "contender": contender, "ms": {"p50": ms}}
    return {**head, "backend": None, "ratio": None, "graph_ms": None, **more}


def record(folder: Path, op: str, rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{op}.json").write_text(json.dumps({"op": op, "runs": [{"rows": rows}]}))


def summarise(results: list[Result], folder: Path) -> str:
    return gpu_summary.summarise("gpu on NVIDIA Test", results, STAGES, folder, 12.0)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([PASS, PASS, PASS], PASS),
        ([PASS, FAIL, SKIPPED], FAIL),
        ([PASS, PASS], NOT_REACHED),
        ([PASS, NOT_REACHED, SKIPPED], NOT_REACHED),
        ([PASS, PASS, SKIPPED], SKIPPED),
    ],
)
def test_the_overall_verdict(statuses, expected, tmp_path):
    results = [Result(s, Verdict(v)) for s, v in zip(STAGES, statuses, strict=False)]
    assert summarise(results, tmp_path).startswith(f"# {expected}: gpu on NVIDIA Test, 12 s\n")


def test_verdicts_then_failed_tests_then_figures(tmp_path):
    graph = {"p50": 0.03}
    mine = row("ours", 0.0512, backend="cuda", graph_ms=graph, percent_of_floor=45.2)
    other = row("ours_triton", 0.071, backend="triton", ratio=1.4)
    record(tmp_path, "vicreg", [mine, other, row("eager", 0.6, ratio=12.31)])
    failures = {"tests/test_a.py::test_b[cuda]": "AssertionError: off by one"}
    results = [
        Result(BUILD, Verdict(FAIL, "exit status 1", "line\nnvcc error: no\n"), 3.0),
        Result(TESTS, Verdict(FAIL, "5 passed, 1 failed", "noise", failures, ["2 skipped: why"])),
    ]
    text = summarise(results, tmp_path)
    parts = [
        "- FAIL build, 3 s: exit status 1\n",
        "- FAIL parity, 0 s: 5 passed, 1 failed\n",
        "- NOT REACHED trainer\n",
        "- tests/test_a.py::test_b[cuda]: AssertionError: off by one\n",
        "nvcc error: no\n",
        "- parity: 2 skipped: why\n",
        "- vicreg 256x8192 bf16: cuda 0.0512 ms (graph 0.03) 45% of floor, triton 0.071 ms, "
        "eager 12.3x\n",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "noise" not in text, "the failed tests say it"


def test_the_first_case_of_every_op_comes_first(tmp_path):
    cases = [row("ours", 1.0, backend="cuda"), row("ours", 2.0, backend="cuda", case="later")]
    for op in ("ema", "vicreg"):
        record(tmp_path, op, cases)
    lines = gpu_summary.figures(gpu_summary.read_records(tmp_path))
    assert [line.split(":")[0] for line in lines] == [
        "- ema 256x8192 bf16",
        "- vicreg 256x8192 bf16",
        "- ema later bf16",
        "- vicreg later bf16",
    ]


def test_it_stays_under_8000_characters_and_keeps_the_verdicts(tmp_path):
    for op in "abcdefghi":
        rows = [row("ours", 1.0, backend="cuda", case=f"case{n}") for n in range(60)]
        record(tmp_path, op, rows)
    failures = {f"tests/test_a.py::test_b[{n}]": "x" * 500 for n in range(3000)}
    many = [Stage(f"stage {n}") for n in range(30)]
    results = [Result(stage, Verdict(FAIL, "y" * 500, "z" * 99999)) for stage in many]
    notes = [f"note {n} " + "w" * 300 for n in range(99)]
    results[3] = Result(many[3], Verdict(FAIL, "many failed", "", failures, notes))
    text = gpu_summary.summarise("t" * 999, results, many, tmp_path, 1.0)
    assert len(text) < 8000
    for stage in many:
        assert f"- FAIL {stage.name}, " in text
    assert "test_b[0]: x" in text
    assert "more failed tests" in text
    quiet = [Result(stage, Verdict(PASS)) for stage in STAGES]
    text = summarise(quiet, tmp_path)
    assert 6500 < len(text) < 8000, "what is left goes to the figures"
    assert "more cases" in text


def test_half_written_records_stop_nothing(tmp_path):
    record(tmp_path, "ema", [row("ours", 1.0, backend="cuda")])
    (tmp_path / "vicreg.json").write_text('{"op": "vicreg", "ru')
    assert len(gpu_summary.read_records(tmp_path)) == 1
    assert gpu_summary.read_records(tmp_path / "absent") == []


def contents(out: Path) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO((out / "results.tar.gz").read_bytes())) as archive:
        return {name: archive.extractfile(name).read() for name in archive.getnames()}


def test_the_archive_fits_and_keeps_the_records(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    (work / "logs").mkdir(parents=True)
    out.mkdir()
    noise = os.urandom(3 << 20)
    (work / "logs" / "build.log").write_bytes(b"begin" + noise + b"the end")
    (work / "records").mkdir()
    whole = json.dumps({"rows": noise[: 1 << 19].hex()}).encode()
    (work / "records" / "ema.json").write_bytes(whole)
    (work / "records" / "ema.json.partial").write_bytes(b"")
    gpu_summary.write_archive(work, out)
    files = contents(out)
    assert sorted(files) == ["logs/build.log", "records/ema.json"]
    assert len(files["logs/build.log"]) == (3 << 20) + 12
    gpu_summary.write_archive(work, out, most=2 << 20)
    assert (out / "results.tar.gz").stat().st_size <= 2 << 20
    files = contents(out)
    assert files["records/ema.json"] == whole
    log = files["logs/build.log"]
    assert log.startswith(b"begin")
    assert log.endswith(b"the end")
    assert b"bytes were left out" in log
    assert sorted(path.name for path in out.iterdir()) == ["results.tar.gz"]
