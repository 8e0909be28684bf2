"""The accuracy by precision: a row for each loss that can be imported, and what a table says."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys

import pytest
import torch

from bench import page, parity, parity_table, report
from vicreg_kernels.core import dispatch

FORMULA = "facebookresearch/vicreg's formula"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if dispatch.missing("cpu", "cpu", torch.float32) is not None:
        pytest.skip("the CPU library is not built")
    folder = tmp_path_factory.mktemp("results")
    with contextlib.redirect_stdout(None):
        words = ["--ops", "VICReg", "--shapes", "32x64,64x32", "--output", str(folder)]
        assert parity.main(words) == 0
    (record,) = report.load([folder])
    return record


def rows_of(found, **selected):
    rows = found["runs"][0]["rows"]
    return [row for row in rows if selected.items() <= row.items()]


def test_rows(found):
    """Of each loss every contender, shape and precision, or why there is none."""
    (run,) = found["runs"]
    present = {row["name"] for row in run["rows"]}
    absent = {skip["name"] for skip in run["skipped"]}
    assert present | absent == {n for n, loss in parity.LOSSES.items() if loss.op == "VICReg"}
    assert not present & absent
    for name in present:
        contenders = {row["contender"] for row in rows_of(found, name=name)}
        assert len(rows_of(found, name=name)) == 2 * 4 * len(contenders)


def test_ours_is_finite_and_close(found):
    bounds = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3, parity_table.SCALED: 2e-3}
    mine = [row for row in rows_of(found) if row["contender"] != "theirs"]
    assert mine
    for row in mine:
        stays_half = row["name"].startswith("pytorch-metric") and row["contender"] == "drop_in"
        if stays_half and row["precision"] == parity_table.SCALED:
            assert row["gradient"] != "finite"
            continue
        assert (row["loss"], row["gradient"]) == ("finite", "finite"), row
        assert row["gradient_error"] < bounds[row["precision"]], row
        assert row.get("settled_scale") in (None, 65536.0)


def test_the_published_formula_overflows_at_the_first_scale(found):
    rows = rows_of(found, name=FORMULA, contender="theirs")
    for row in rows:
        scaled = row["precision"] == parity_table.SCALED
        assert (row["gradient"] == "finite") != scaled, row
        assert (row["gradient_error"] is None) == scaled
        if scaled:
            assert row["scale"] == 65536.0
            assert 1.0 <= row["settled_scale"] < 65536.0


def test_tables(found):
    text = report.table(found, found["runs"][0])
    (line,) = [line for line in text.splitlines() if FORMULA in line and "theirs" in line]
    assert "NaN" in line or "inf" in line
    assert page.section(found).count(f"| {FORMULA} |") == 2
    hidden = copy.deepcopy(found)
    hidden["runs"][0]["skipped"] = [{"name": "a loss", "contender": "theirs", "why": "not here"}]
    assert "Left out: a loss (theirs): not here." in page.section(hidden)
    for row in rows_of(hidden, name=FORMULA, precision=parity_table.SCALED):
        row["settled_scale"] = None
    assert "none" in parity_table.lines_of(hidden["runs"][0], "VICReg")[1]
    json.dumps(found, allow_nan=False)


def test_a_library_that_is_absent_is_named(monkeypatch):
    def absent(peer):
        raise ImportError(f"No module named {peer!r}")

    monkeypatch.setattr(parity.peers, "theirs", absent)
    run = parity.Run({}, torch.device("cpu"))
    run.add("lightly VICRegLoss", ["8x16"])
    assert run.entry["rows"] == []
    assert "No module named 'lightly'" in run.entry["skipped"][0]["why"]
    assert not run.failed


def broken(peer):
    """A library that can be imported and no more."""

    def get(name):
        if peer == "lightly":
            raise AttributeError(f"module 'lightly.loss' has no attribute {name!r}")
        raise RuntimeError("operator torchvision::nms does not exist")

    return get


@pytest.mark.parametrize("name", ["lightly VICRegLoss", "solo-learn vicreg_loss_func"])
def test_a_broken_library_costs_its_own_rows(name, monkeypatch, tmp_path):
    """The others are measured, and the record says what broke."""
    if dispatch.missing("cpu", "cpu", torch.float32) is not None:
        pytest.skip("the CPU library is not built")
    monkeypatch.setattr(parity.peers, "theirs", broken)
    monkeypatch.setattr(parity, "LOSSES", {n: parity.LOSSES[n] for n in (name, FORMULA)})
    with contextlib.redirect_stdout(None):
        words = ["--ops", "VICReg", "--shapes", "8x16", "--output", str(tmp_path)]
        assert parity.main(words) == 0
    (record,) = report.load([tmp_path])
    assert {row["name"] for row in rows_of(record)} == {FORMULA}
    (skip,) = record["runs"][0]["skipped"]
    assert (skip["name"], skip["contender"]) == (name, "theirs")
    assert skip["why"].startswith(
        ("AttributeError: module 'lightly.loss'", "RuntimeError: operator")
    )


def test_ours_that_cannot_give_the_truth_is_a_failure(monkeypatch):
    def no_double(*args):
        raise RuntimeError("no float64")

    published = parity.Published("VICReg", "", theirs=lambda: parity.eager, ours=lambda: no_double)
    monkeypatch.setattr(parity, "LOSSES", {"a loss": published})
    run = parity.Run({}, torch.device("cpu"))
    run.add("a loss", ["8x16"])
    assert run.failed
    (skip,) = run.entry["skipped"]
    assert (skip["contender"], skip["why"]) == ("ours", "RuntimeError: no float64")


def test_the_truth_is_of_the_rounded_embeddings():
    """A loss that is exact has no error, whatever the rounding of its embeddings."""

    def exact(x, y):
        assert x.dtype == torch.float64
        return (x * y).sum()

    views = parity.embeddings(8, 4, torch.device("cpu"))
    truth = parity.Truth.of(lambda: exact, views, torch.bfloat16)
    x, y = (view.bfloat16().double() for view in views)
    assert not torch.equal(x, views[0])
    assert truth.value == (x * y).sum()
    assert torch.equal(truth.gradients[0], y)
    assert torch.equal(truth.embeddings[0].double(), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_random_directions_are_the_same_in_every_dtype(dtype):
    before = torch.randn
    with parity.drawn_alike():
        one, alike = torch.randn(5, 3), torch.randn(5, 3, dtype=torch.float32)
    with parity.drawn_alike():
        found = torch.randn(5, 3, dtype=dtype)
    assert not torch.equal(one, alike)
    assert found.dtype == dtype
    assert torch.equal(found, one.to(dtype))
    assert torch.randn is before
    with pytest.raises(KeyError), parity.drawn_alike():
        raise KeyError
    assert torch.randn is before


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of eb_jepa on the path, which is no installed package."""
    folder = tmp_path / "checkout"
    (folder / "eb_jepa").mkdir(parents=True)
    (folder / "eb_jepa" / "__init__.py").write_text("")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.delitem(sys.modules, "eb_jepa", raising=False)
    return folder, done.stdout.strip()


def test_a_checkout_is_named_by_its_commit(checkout, monkeypatch):
    folder, commit = checkout
    found = parity._versions()["eb_jepa"]
    assert found.startswith("commit ")
    assert commit.startswith(found.removeprefix("commit "))
    monkeypatch.setattr(parity.environment, "ROOT", folder.parent)
    assert parity._versions()["eb_jepa"] == "commit unknown", "a folder in this checkout"


def test_what_fails_is_noted_and_ours_is_a_failure():
    def refuses():
        raise RuntimeError("not implemented for 'Half'\nat great length")

    run = parity.Run({}, torch.device("cpu"))
    truth = parity.Truth.of(lambda: parity.eager, parity.embeddings(8, 4, run.device), torch.half)
    about = {"name": FORMULA, "precision": "float16"}
    run._row({**about, "contender": "theirs"}, refuses, truth, False)
    assert not run.failed
    run._row({**about, "contender": "ours"}, refuses, truth, False)
    assert run.failed
    why = "RuntimeError: not implemented for 'Half'"
    assert [skip["why"] for skip in run.entry["skipped"]] == [why] * 2


@pytest.mark.parametrize("words", [["--ops", "none"], ["--shapes", "64"], ["--shapes", "1x64"]])
def test_bad_arguments(words, capsys):
    with pytest.raises(SystemExit):
        parity.main(words)
    assert f"argument {words[0]}" in capsys.readouterr().err
