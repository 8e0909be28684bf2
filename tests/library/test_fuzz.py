"""Random calls of every op against the float64 reference, a few hundred an op (`make fuzz` runs as
many as time allows). fuzz/runner.py has the rule.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.fuzz import campaign, runner

LINES = {"vicregl_loss": 80, "vicregl_terms": 80}
SAMPLE = "(x=T((5, 3), 'float32', 'strided', 2.0, 1), y=T((5, 3), 'float32', 'sliced', 2.0, 2)"


@pytest.mark.parametrize("op", runner.OPS)
def test_calls_are_right_or_refused_by_name(op) -> None:
    seeds = (f"{op}/{n}" for n in range(LINES.get(op, 200)))
    with campaign.one_thread():
        report = campaign.run(seeds)
    assert not report.faults, report.text()
    for reason, count in report.open.items():
        warnings.warn(f"{op}, {count} calls, known: {reason}", stacklevel=1)
    total = report.counts.total()
    assert report.counts["unusable"] < 0.05 * total
    assert report.counts["right"] > 0.3 * total, report.text()
    assert report.counts["refused"] > 0.1 * total, report.text()


def test_a_line_and_its_seed_are_the_same_call() -> None:
    seed = "barlow_twins_loss/3"
    line = campaign.line_of(seed)
    assert line == campaign.line_of(seed)
    one, two = runner.evaluate(line), runner.evaluate(line)
    assert [z.tolist() for z in one.values] == [z.tolist() for z in two.values]


def _broken(monkeypatch, change) -> None:
    """vicreg_loss with its result, or its arguments, changed."""
    whole = runner.vicreg_kernels.vicreg_loss

    def broken(**arguments):
        return change(whole, arguments)

    monkeypatch.setattr(runner.vicreg_kernels, "vicreg_loss", broken)


def _only(fused: bool):
    """A change of the fused result alone, as a wrong kernel would make it."""

    def change(whole, arguments):
        out = whole(**arguments)
        return out * 1.0001 if (arguments["backend"] == "cpu") is fused else out

    return change


def _writes(whole, arguments):
    arguments["x"].data.view(-1)[:1].mul_(2.0) if arguments["x"].is_contiguous() else None
    return whole(**arguments)


def _raises(text, kind=ValueError):
    def change(whole, arguments):
        raise kind(text)

    return change


def _random(whole, arguments):
    return whole(**arguments) * (1.0 + torch.rand(()) * 1e-6)


def _loses(whole, arguments):
    out = whole(**arguments)
    return out * float("nan") if arguments["backend"] == "cpu" else out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_only(fused=True), "norm error"),
        (_raises("expected a matrix"), "no argument's name"),
        (_raises("z: is no argument"), "no argument's name"),
        (_raises("x: wrong", RuntimeError), "raises RuntimeError"),
        (_random, "two runs differ"),
        (_loses, "nan where the truth is"),
    ],
)
def test_the_rule_sees_a_planted_fault(monkeypatch, change, message) -> None:
    line = f"vicreg_loss{SAMPLE}, backend='cpu')"
    assert runner.hold(line) == "right"
    _broken(monkeypatch, change)
    with pytest.raises(runner.Fault, match=message):
        runner.hold(line)


def test_the_rule_sees_a_changed_input(monkeypatch) -> None:
    line = "vicreg_loss(x=T((5, 3)), y=T((5, 3)), backend='cpu')"
    _broken(monkeypatch, _writes)
    with pytest.raises(runner.Fault, match="an input was changed"):
        runner.hold(line)


def test_a_finite_number_is_refused_where_the_truth_is_nan(monkeypatch) -> None:
    line = "vicreg_loss(x=T((5, 3), fill='nan'), y=T((5, 3)), backend='cpu')"
    assert runner.hold(line) == "right"

    def finite(whole, arguments):
        out = whole(**arguments)
        return out.nan_to_num(1.0) if arguments["backend"] == "cpu" else out

    _broken(monkeypatch, finite)
    with pytest.raises(runner.Fault, match="where the truth is nan"):
        runner.hold(line)
