"""What changed between two sets of records, and the progress of a run."""

from __future__ import annotations

import io
import json
import math
import random
import shutil
import statistics
import sys
from pathlib import Path

import pytest

from bench import compare, flat, groups, measure, progress, report, run
from bench.case import Case
from tests.helpers.bench_fake import fake_fixture, fake_op, fake_plan, go, read  # noqa: F401
from tests.helpers.bench_records import errors, record, row, write


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
    files = (write(tmp_path / n, record([row(n, "ours", 1.0)])) for n in "ab")
    one, two = (compare.last(flat.collect([file])) for file in files)
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


def slowed(path: Path, factor: float) -> None:
    """Every time of a record multiplied, as of nine rounds that agree."""
    made = read(path)
    for each in (timed for run_ in made["runs"] for timed in run_["rows"]):
        each["rounds"], each["ms"] = 9, dict.fromkeys(("p20", "p50", "p80"), factor)
    path.write_text(json.dumps(made))


def test_files_that_are_complete_are_compared_too(fake, tmp_path, capsys):
    """With --missing nothing is left to measure; what the files hold is the new side."""
    select = ("--contenders", "ours,eager", "--output", tmp_path / "new")
    assert go(*select) == 0
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "new" / "fake.json", tmp_path / "old")
    slowed(tmp_path / "old" / "fake.json", 1e9)
    capsys.readouterr()
    assert go(*select, "--missing", "--compare", tmp_path / "old") == 0
    text = capsys.readouterr().out
    assert "fake: nothing to measure" in text
    assert "ours: 2 faster" in text


@pytest.mark.parametrize("written", [True, False])
def test_what_changed_is_said_after_a_lost_device(fake, written, tmp_path, monkeypatch, capsys):
    """OLD is the folder that is written: the process that goes on has its rows from the first one,
    and measures the op that was not begun anew.
    """
    lost = []

    def breaks(device, dtype, backend):
        plan = fake_plan(device, dtype, backend)

        def step():
            lost.append(1)
            raise groups.Poisoned("illegal access")

        if not lost:
            plan.steps["eager"] = step
        return plan

    first = Case("first", fake_plan, {})
    fake(fake_op(first=first, second=Case("second", breaks, {})))
    monkeypatch.setitem(sys.modules, "bench.later", fake_op(third=Case("third", fake_plan, {})))
    monkeypatch.setattr(run, "OPS", ("fake", "later"))
    monkeypatch.setattr(groups, "check_alive", check_poisoned)
    lost.append(0)
    select = ["--contenders", "ours,eager", "--compare", tmp_path / "old"]
    assert go("--contenders", "ours,eager", "--output", tmp_path / "old") == 0
    for op in ("fake", "later"):
        slowed(tmp_path / "old" / f"{op}.json", 1e9)
    lost.clear()
    went_on = []
    monkeypatch.setattr(run.os, "execv", lambda program, words: went_on.append(words[3:]))
    capsys.readouterr()
    if not written:
        assert go(*select) == 1
        assert "ours: 1 faster" in capsys.readouterr().out, "what was measured until then"
        return
    assert go(*select, "--output", tmp_path / "old") == 1
    (words,) = went_on
    capsys.readouterr()
    assert run.main(words) == 0, "ours did not fail"
    text = capsys.readouterr().out
    assert "ours: 3 faster" in text
    assert "the others: 2 faster" in text
    made = read(tmp_path / "old" / "later.json")
    assert len(made["runs"]) == 1
    assert "--continued" not in made["runs"][0]["command"]
    assert not Path(words[words.index("--continued") + 1]).exists()


def check_poisoned(device, error):
    if isinstance(error, groups.Poisoned):
        raise error


def test_the_interval_by_hand():
    """Of five and of nine rounds: with five the second and fourth sample are p20 and p80, whose
    expected distance by Blom is 2 * 0.4972 (the quantile of 3.625 / 5.25); with nine the third and
    seventh, 2 * 0.5720 (of 6.625 / 9.25). Student's 97.5 % for 4 degrees is 2.776.
    """
    old, new = flat_row(10.0, 1.1, 5), flat_row(11.0, 1.2, 9)
    deviations = [2 * math.log(1.1) / (2 * 0.4972), 2 * math.log(1.2) / (2 * 0.5720)]
    assert compare.deviation(old) == pytest.approx(deviations[0], rel=1e-3)
    assert compare.deviation(new) == pytest.approx(deviations[1], rel=1e-3)
    variance = deviations[0] ** 2 / 5 + deviations[1] ** 2 / 9
    reach = 2.776 * math.sqrt(1.5708 * variance)
    low, high = compare.change(old, new).interval
    assert low == pytest.approx(1.1 * math.exp(-reach), rel=1e-3)
    assert high == pytest.approx(1.1 * math.exp(reach), rel=1e-3)


@pytest.mark.parametrize("old", ["empty", "parity alone", "no rows"])
def test_an_old_without_times_is_an_error(old, fake, tmp_path, capsys):
    new, folder = write(tmp_path / "new", record([row("64x8", "ours", 1.0)])), tmp_path / "old"
    folder.mkdir()
    if old == "parity alone":
        write(folder, errors())
    elif old == "no rows":
        write(folder, record([]))
    for call in (
        lambda: report.main([str(new), "--compare", str(folder)]),
        lambda: go("--compare", folder),
    ):
        with pytest.raises(SystemExit):
            call()
        assert f"--compare: {folder} holds no times" in capsys.readouterr().err


def test_two_files_of_an_op_in_a_folder_are_an_error(tmp_path, capsys):
    """Their rows would be taken for two runs of one file."""
    one = write(tmp_path / "new", record([row("64x8", "ours", 1.0)]))
    shutil.copy(one, one.with_name("again.json"))
    for options in ([], ["--compare", str(one)], ["--csv", str(tmp_path / "all.csv")]):
        with pytest.raises(SystemExit):
            report.main([str(tmp_path / "new"), *options])
        error = capsys.readouterr().err
        assert f"{one.with_name('again.json')} and {one} are both of vicreg" in error
