"""What changed between two sets of records, and the progress of a run."""

from __future__ import annotations

import io
import json
import random
import statistics
import sys

import pytest

from bench import compare, measure, progress, report, run
from tests.helpers.bench_fake import fake_fixture, go, read  # noqa: F401
from tests.helpers.bench_records import record, row, write


def flat_row(p50: float, spread: float = 1.02, rounds: int = 9) -> dict:
    made = {"op": "vicreg", "case": "c", "dtype": "float32", "contender": "ours"}
    made |= {"p20_ms": p50 / spread, "p50_ms": p50, "p80_ms": p50 * spread}
    return made | {"rounds": rounds}


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (flat_row(10.0), flat_row(8.0), "faster"),
        (flat_row(10.0), flat_row(12.0), "slower"),
        (flat_row(10.0), flat_row(10.05), "within noise"),
        (flat_row(10.0, 1.5), flat_row(12.0, 1.5), "within noise"),
        (flat_row(10.0), flat_row(12.0, rounds=2), "within noise"),
        (flat_row(10.0), flat_row(12.0, rounds=1), "one round, no interval"),
        (flat_row(10.0, 1.0), flat_row(10.0, 1.0), "within noise"),
    ],
)
def test_verdicts(old, new, verdict):
    found = compare.change(old, new)
    assert found.verdict == verdict
    assert found.ratio == new["p50_ms"] / old["p50_ms"]
    if found.interval is not None:
        low, high = found.interval
        assert low <= found.ratio <= high


@pytest.mark.parametrize("rounds", [2, 3, 4, 5, 9, 25])
def test_the_deviation_is_that_of_the_samples(rounds):
    """On average over many runs of a known one, for every number of rounds."""
    generator = random.Random(0)
    found = []
    for _ in range(2000):
        times = measure.Spread.of([generator.lognormvariate(1.0, 0.1) for _ in range(rounds)])
        each = {"p20_ms": times.p20, "p80_ms": times.p80, "rounds": rounds}
        found.append(compare.deviation(each))
    assert statistics.mean(found) == pytest.approx(0.1, rel=0.08)


def test_equal_machines_are_seldom_said_to_differ():
    """The interval is one of 95 %: of 300 pairs about 15 fall outside."""
    generator = random.Random(1)

    def made() -> dict:
        times = measure.Spread.of([generator.lognormvariate(1.0, 0.05) for _ in range(8)])
        return flat_row(times.p50, rounds=8) | {"p20_ms": times.p20, "p80_ms": times.p80}

    wrong = sum(compare.change(made(), made()).verdict != "within noise" for _ in range(300))
    assert wrong <= 27


def test_two_folders_are_compared(tmp_path, capsys):
    old = [row("64x8", "ours", 10.0), row("64x8", "eager", 50.0), row("gone", "ours", 1.0)]
    new = [row("64x8", "ours", 5.0), row("64x8", "eager", 50.1), row("64x8", "extra", 2.0)]
    write(tmp_path / "old", record(old))
    write(tmp_path / "new", record(new, commit="def5678"))
    arguments = [str(tmp_path / "new"), "--compare", str(tmp_path / "old")]
    assert report.main(arguments) == 0
    text = capsys.readouterr().out
    assert "commit: abc1234 before, def5678 now" in text
    assert "threads" not in text
    words = {line.split()[3]: line.split()[4:] for line in text.splitlines() if " f32 " in line}
    assert words["ours"][:3] == ["10", "5", "0.500"]
    assert words["ours"][-1] == "faster"
    assert words["eager"][-2:] == ["within", "noise"]
    assert words.keys() == {"ours", "eager"}
    assert "ours: 1 faster; median ratio 0.500" in text
    assert "measured only before: 1" in text
    assert "measured only now: 1" in text
    write(tmp_path / "old" / "again", record(old))
    with pytest.raises(SystemExit):
        report.main(arguments)
    assert "name one folder" in capsys.readouterr().err


def test_nothing_in_common(tmp_path):
    one, two = (compare.load([write(tmp_path / n, record([row(n, "ours", 1.0)]))]) for n in "ab")
    assert compare.told(one, two).startswith("nothing to compare")


def test_a_run_says_what_changed(fake, tmp_path, capsys):
    """OLD may be the folder that the run writes: it is read before."""
    assert go("--contenders", "ours,eager", "--output", tmp_path) == 0
    made = read(tmp_path / "fake.json")
    for each in made["runs"][0]["rows"]:
        each["rounds"], slow = 9, each["contender"] == "ours"
        each["ms"] = dict.fromkeys(("p20", "p50", "p80"), 1e9 if slow else 1e-9)
    (tmp_path / "fake.json").write_text(json.dumps(made))
    capsys.readouterr()
    assert go("--contenders", "ours,eager", "--output", tmp_path, "--compare", tmp_path) == 0
    text = capsys.readouterr().out
    assert "ours: 2 faster" in text
    assert "the others: 2 slower" in text
    for wrong in (tmp_path / "nowhere", tmp_path / "bad.json"):
        (tmp_path / "bad.json").write_text("{")
        with pytest.raises(SystemExit):
            go("--compare", wrong)
        assert wrong.name in capsys.readouterr().err


def test_the_bar_is_drawn_on_a_terminal_or_where_asked(fake, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    assert run.parse([]).progress is False, "standard error is no terminal under pytest"
    assert go("--contenders", "ours") == 0
    assert capsys.readouterr().err == ""
    assert go("--contenders", "ours", "--progress") == 0
    shown = capsys.readouterr()
    assert "fake second float32" in shown.err
    assert "2/2" in shown.err
    assert "<" in shown.err, "the time left"
    assert "\r" not in shown.out
    assert "Sum of squares" in shown.out
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run.parse([]).progress is True
    assert run.parse(["--no-progress"]).progress is False
    monkeypatch.setattr(progress, "INSTALLED", False)
    assert run.parse([]).progress is False
    with pytest.raises(SystemExit):
        run.parse(["--progress"])
    assert "tqdm is not installed" in terminal.getvalue()
