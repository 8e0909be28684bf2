"""The page of the benchmark records in a browser; the flat rows, the CSV and the fits behind it."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

from bench import flat, parity_table, report, report_page, scaling
from tests.helpers.bench_records import errors, record, row, write

PROBE = Path(__file__).resolve().parents[1] / "helpers" / "report_probe.js"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


def losses() -> dict:
    """Ours grows as N^1.5, eager as N^0.5; a case that is left out, and a name that is no text."""
    rows = []
    for size, peak in ((64, 4.0), (128, 8.0), (256, 0.0), (1024, None)):
        ours, eager = size**1.5 / 100, size**0.5
        work = {"floor_ms": ours / 2, "gbps": 1.0, "bound": "bytes", "peak_mib": peak}
        rows.append(row(f"{size}x32", "ours", ours, error=1e-7, **work))
        rows.append(row(f"{size}x32", "eager", eager, ratio=eager / ours, target=2.0, **work))
    skip = {"case": "64x32", "dtype": "float32", "contender": "peer"}
    why = 'says "</script><b>no</b>", and more'
    return record(rows, skipped=[skip | {"reason": why}])


def step() -> dict:
    shares = {"attention": 0.25, "torch: linear layers and convolution": 0.5, "rest": 0.25}
    rows = [row("tiny", "ours", 10.0, shares=shares), row("tiny", "plain", 15.0, ratio=1.5)]
    return record(rows, "jepa_step")


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Two folders of one name, of different commits."""
    one, two = tmp_path / "one" / "cpu", tmp_path / "two" / "cpu"
    write(one, losses())
    write(one, step())
    write(two, losses() | {"runs": [losses()["runs"][0] | {"commit": "fff0000"}]})
    precise = errors()
    other = {"op": "SIGReg", "name": "some SIGReg", "loss": "inf", "loss_error": None}
    precise["runs"][0]["rows"] += [each | other for each in precise["runs"][0]["rows"]]
    reason = {"name": "another", "contender": "theirs", "why": "cannot be imported"}
    precise["runs"][0]["skipped"] = [{"op": "VICReg"} | reason]
    write(two, precise)
    return [one, two]


def test_the_rows_hold_what_the_records_hold(folders):
    found = flat.collect(folders)
    assert [folder.name for folder in found] == ["one/cpu", "two/cpu"]
    rows = flat.flattened(found)
    assert len(rows) == 8 + 2 + 8
    assert {r["commit"] for r in rows} == {"abc1234", "fff0000"}
    ours = next(r for r in rows if r["case"] == "1024x32" and r["contender"] == "ours")
    assert (ours["peak_mib"], ours["ratio"], ours["graph_p50_ms"]) == (None, None, None)
    assert ours["percent_of_floor"] == 50
    tiny = next(r for r in rows if r["case"] == "tiny")
    assert (tiny["floor_ms"], tiny["bound"], tiny["gbps"]) == (None, None, None)
    assert flat.collect([folders[0].parent, folders[0]])[0].name == "cpu"


def test_errors_by_precision_are_rows_of_their_own(folders):
    found = report_page.data(flat.collect(folders))
    vicreg, sigreg = found["errors"]
    assert (vicreg["op"], sigreg["op"]) == ("vicreg", "sigreg")
    assert (vicreg["float32 loss"], sigreg["float32 loss"]) == (1e-7, "inf")
    assert (vicreg["folder"], vicreg["commit"]) == ("two/cpu", "abc1234")
    assert [run["rows"] for run in found["runs"] if run["op"] == "parity"] == [8]
    assert found["skipped"][-1]["reason"] == "cannot be imported"
    assert report_page.data(flat.collect(folders[:1]))["errors"] == []


def test_the_last_of_several_runs_counts(tmp_path):
    made = losses()
    made["runs"] *= 2
    rows = flat.flattened(flat.collect([write(tmp_path, made)]))
    assert [r["latest"] for r in rows] == [False] * 8 + [True] * 8


def test_the_csv_has_every_row(folders, tmp_path, capsys):
    path = tmp_path / "out" / "all.csv"
    assert report.main([*map(str, folders), "--csv", str(path)]) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    assert tuple(rows[0]) == flat.FIELDS
    found = next(r for r in rows if (r["case"], r["contender"]) == ("64x32", "ours"))
    assert (float(found["p50_ms"]), found["ratio"]) == (64**1.5 / 100, "")


def test_exponents(folders):
    rows = flat.flattened(flat.collect(folders[:1]))
    titles = {"vicreg": losses()["title"], "jepa_step": "A step"}
    fits = {(f["contender"], f["axis"]): f for f in scaling.fits(rows, titles)}
    ours = fits["ours", "batch"]
    assert (ours["exponent"], ours["count"]) == (pytest.approx(1.5), 4)
    assert (ours["residual"], ours["error"]) == (pytest.approx(0, abs=1e-9),) * 2
    assert ours["fixed"] == "dimensions 32"
    assert [point[0] for point in ours["points"]] == [64, 128, 256, 1024]
    assert fits["eager", "batch"]["exponent"] == pytest.approx(0.5)
    assert fits["ours", "least bytes"]["exponent"] == pytest.approx(1.0)
    assert ("ours", "dimensions") not in fits, "it takes one value"


def test_a_run_that_a_later_one_supersedes_is_in_no_fit(tmp_path):
    """Of two runs of a file, the first of which grows otherwise."""
    made = record([row(f"{n}x32", "ours", n**2.5) for n in (64, 128, 256)])
    later = record([row(f"{n}x32", "ours", n**1.5) for n in (64, 128, 256)])
    made["runs"] += later["runs"]
    rows = flat.flattened(flat.collect([write(tmp_path, made)]))
    (found,) = scaling.fits(rows, {"vicreg": made["title"]})
    assert (found["exponent"], found["count"]) == (pytest.approx(1.5), 3)


def test_a_fit_by_hand():
    points = [(1.0, 1.0), (math.e, math.e**3), (math.e**2, math.e**2)]
    found = scaling.fit(points)
    # logs (0, 0), (1, 3), (2, 2): the line is 2 / 3 + x, the distances -2/3, 4/3, -2/3
    assert (found.exponent, found.intercept) == (pytest.approx(1), pytest.approx(2 / 3))
    assert found.residual == pytest.approx(math.sqrt(24 / 9 / 3))
    assert found.error == pytest.approx(math.sqrt(24 / 9 / 1 / 2))
    two = scaling.fit(points[:2])
    assert (two.exponent, two.residual, two.error, two.points) == (pytest.approx(3), None, None, 2)


# What a row must not hold, and what is said of it.
FIELDS = {
    "backend": (3, "row 3 has no valid 'backend'"),
    "ratio": ("2x", "row 3 has no valid 'ratio'"),
    "target": ([2.0], "row 3 has no valid 'target'"),
    "peak_mib": ("10", "row 3 has no valid 'peak_mib'"),
    "graph_ms": ({"p50": 1.0}, "row 3: graph_ms has no valid 'p20'"),
    "shares": ({"attention": "half"}, "row 3: shares has no valid 'attention'"),
    "error": ("small", "row 3 has no valid 'error'"),
    "dtype": ("float99", "run 0: ceilings has no valid 'float99'"),
}


def broken(change: str) -> str:
    made = losses()
    run = made["runs"][0]
    if change == "no rows":
        del run["rows"]
    elif change in FIELDS:
        run["rows"][3][change] = FIELDS[change][0]
    elif change == "no ratio":
        del run["rows"][3]["ratio"]
    elif change == "other ceilings":
        run["ceilings"]["float32"] = {"copy": 1.0, "matmul_tflops": 1.0}
    elif change == "parity, skipped":
        made = errors()
        made["runs"][0]["skipped"] = [{"name": "some", "contender": "nobody's", "why": "x"}]
    elif change == "parity without an error":
        made = errors()
        made["runs"][0]["rows"][1]["gradient_error"] = None
    elif change.startswith("parity, "):
        made = errors(**{change.removeprefix("parity, "): "much"})
    elif change == "a row without times":
        run["rows"][3]["ms"] = None
    elif change == "a time of 0":
        run["rows"][3]["ms"]["p50"] = 0
    elif change == "NaN":
        run["rows"][3]["ms"]["p50"] = float("nan")
    elif change == "runs that are no list":
        made["runs"] = {}
    elif change == "foreign":
        return json.dumps({"results": [1, 2]})
    elif change == "a list":
        return "[]"
    else:
        return json.dumps(made)[:300]
    return json.dumps(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no rows", "run 0 has no valid 'rows'"),
        *((name, said) for name, (_, said) in FIELDS.items()),
        ("no ratio", "row 3 has no valid 'ratio'"),
        ("other ceilings", "ceilings of float32 has no valid 'copy_gbps'"),
        ("parity, loss_error", "row 0 has no valid 'loss_error'"),
        ("parity, gradient", "row 0 has no valid 'gradient': got 'much', takes"),
        ("parity, contender", "row 0 has no valid 'contender'"),
        ("parity, settled_scale", "row 3 has no valid 'settled_scale'"),
        ("parity, skipped", "skipped 0 has no valid 'contender'"),
        ("parity without an error", "row 1 has no valid 'gradient_error'"),
        ("a row without times", "run 0: row 3 has no valid 'ms'"),
        ("a time of 0", "not positive"),
        ("NaN", "NaN is no number"),
        ("runs that are no list", "no valid 'runs'"),
        ("foreign", "schema None"),
        ("a list", "schema None"),
        ("cut off", "is damaged"),
    ],
)
def test_a_damaged_or_foreign_file_is_named(change, said, folders, tmp_path, capsys):
    (folders[1] / "barlow.json").write_text(broken(change))
    with pytest.raises(SystemExit):
        report.main([*map(str, folders), "--output", str(tmp_path / "report.html")])
    error = capsys.readouterr().err
    assert "two/cpu/barlow.json" in error
    assert said in error
    assert not (tmp_path / "report.html").exists()


def test_a_file_that_cannot_be_read_or_written_is_one_line(folders, tmp_path, capsys):
    (tmp_path / "a file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "vicreg.json").mkdir()
    cases = [
        [tmp_path / "folder"],
        [folders[0], "--output", tmp_path / "a file" / "page.html"],
        [folders[0], "--csv", tmp_path / "folder"],
    ]
    for words in cases:
        with pytest.raises(SystemExit):
            report.main([*map(str, words)])
        assert re.search(r"error: \[Errno \d+\] [^\n]*\n$", capsys.readouterr().err)


def test_what_no_figure_is_drawn_of_is_one_line(tmp_path, capsys):
    others = record([row("64x8", "eager", 1.0)])
    empty = record([], "ema")
    for made, said in (
        (errors(), "this is a record of errors by precision"),
        (empty, "the first run of this record of ema has no rows"),
        (others, "no row of ours in float32"),
    ):
        file = write(tmp_path, made)
        with pytest.raises(SystemExit):
            report.main([str(file), "--figure", str(tmp_path / "x.png")])
        error = capsys.readouterr().err
        assert "error: --figure" in error
        assert said in error
        assert not (tmp_path / "x.png").exists()


def test_a_folder_is_read_once(folders, tmp_path, monkeypatch, capsys):
    reads, own = [], report.read
    monkeypatch.setattr(report, "read", lambda file: (reads.append(file), own(file))[1])
    assert report.main([str(folders[0]), "--csv", str(tmp_path / "all.csv")]) == 0
    assert sorted(file.name for file in reads) == ["jepa_step.json", "vicreg.json"]


@pytest.mark.skipif(not BROWSER, reason="no browser")
def test_the_page_in_a_browser(folders, tmp_path):
    """One load, as a browser's start is most of what this costs: 2 CPU-seconds."""
    page = report_page.page(flat.collect(folders))
    assert not re.search(r"(?:src|href)=[\"'](?!#|data:,)|https?://(?!www\.w3\.org/2000/svg)", page)
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"<script>{PROBE.read_text()}</script></body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
    command += ["--virtual-time-budget=2000", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    (text,) = re.findall(r'<pre id="told">([^<]*)</pre>', done.stdout)
    told = json.loads(unquote(text))
    assert told["op"] == "vicreg"
    head, line = told["published"]
    figures = dict(zip(head, line, strict=True))
    assert (figures["Loss"], figures["Whose"]) == ("some VICRegLoss", "theirs")
    assert (figures["float32: loss"], figures["bfloat16: gradient"]) == ("1e-7", "2e-7")
    scaled = f"{parity_table.SCALED}: gradient"
    assert (figures[scaled], figures["Scale"], figures["Shapes"]) == ("NaN", "2048", "64x256")
    assert told["allPublished"] == 2
    assert "cannot be imported" in told["reason"]
    assert told["figures"] == [1, 1, 1, 1, 4, 1]
    ours, eager = (
        [f(n) for n in (64, 128, 256, 1024)] for f in (lambda n: n**1.5 / 100, math.sqrt)
    )
    expected = sorted([*ours, *eager] * 2)
    for shown, wanted in ((told["ascending"], expected), (told["descending"], expected[::-1])):
        assert [float(cell) for cell in shown] == pytest.approx(wanted, rel=0.01)
    cases = ["64x32", "128x32", "256x32", "1024x32"]
    assert told["cases"] == [case for case in cases for _ in range(4)], "by the numbers in them"
    ratios = [f"{ratio}\u00d7" for ratio in ("0.10", "0.39", "0.78", "1.56") for _ in range(2)]
    assert told["ratios"] == [*ratios, *["\u2013"] * 8], "what is missing comes last"
    assert (told["every"], told["reset"]) == (18, 16 + 2)
    assert told["filtered"] == [["1024x32"], ["eager"], ["\u2013"]]
    assert told["none"][:2] == [0, 0]
    assert "No contender" in told["none"][2]
    (line,) = csv.DictReader(told["csv"].splitlines())
    assert tuple(line) == flat.FIELDS
    assert (line["folder"], line["case"], line["peak_mib"]) == ("one/cpu", "1024x32", "")
    assert float(line["p50_ms"]) == 32
    assert told["svg"].startswith("<svg")
    assert "1024x32" in told["svg"]
    cards, matrix = told["missing"]
    assert "GPUnot measured yet" in cards
    assert "abc1234" in cards
    assert "fff0000" in cards
    assert "not measured yet" in matrix
    assert 'says "</script><b>no</b>", and more' in told["reason"]
    assert told["wide"], "the page scrolls sideways"
    assert told["parts"] == 4, "three shares of one bar, and a bar without"
