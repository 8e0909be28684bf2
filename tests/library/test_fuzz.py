"""Random calls of every op against the float64 reference, a few hundred an op (`make fuzz` runs as
many as time allows). fuzz/runner.py has the rule.
"""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

import vicreg_kernels as kernels
from tests.fuzz import campaign, runner, soak

LINES = {"vicregl_loss": 80, "vicregl_terms": 80}
SAMPLE = "(x=T((5, 3), 'float32', 'strided', 2.0, 1), y=T((5, 3), 'float32', 'sliced', 2.0, 2)"


# Calls whose error is that of float32, which the rule has to know (fuzz/allowances.py).
BARELY = (
    # Two rows: what is left of the gradient is roundings of its parts.
    "barlow_twins_loss(x=T((2, 2), 'float32', 'sliced', 1.0, 43, '', True),"
    " y=T((2, 2), 'float32', 'strided', 1.0, 441, '', True), backend='cpu')",
    # C_ii - 1 of views that agree.
    "barlow_twins_loss(x=T((2, 1), 'float16', 'contiguous', 0.00015, 665, '', False),"
    " y=T((2, 1), 'float16', 'contiguous', 0.00015, 363, '', True), convention='lightly',"
    " eps=0.0, backend='cpu')",
    # Sums of squares that float32 does not hold: NaN, as the page says.
    "barlow_twins_loss(x=T((11, 8), 'bfloat16', 'transposed', 1e+19, 782, '', True),"
    " y=T((11, 8), 'bfloat16', 'contiguous', 1e+19, 911, '', False), backend='cpu')",
    "barlow_twins_loss(x=T((2, 7), 'float32', 'strided', 2.6e-25, 915, '', True),"
    " y=T((2, 7), 'float32', 'strided', 2.6e-25, 860, '', True), eps=0.0, backend='cpu')",
    # The seventeenth knot's angle is seventeen steps from the first one's.
    "sigreg_loss(z=T((8, 3), 'float32', 'contiguous', 1.0, 484, '', True), slices=1,"
    " seed=4611686018427387904, backend='cpu')",
    # Rows that are alike share the roundings of the knots' angles.
    "sigreg_loss(z=T((2, 1), 'float32', 'contiguous', 5.268, 0, 'constant', False),"
    " directions=T((1, 1), 'float32', 'contiguous', 1.0, 0, 'constant', False), knots=33,"
    " backend='cpu')",
    # Cosines that are all nearly 1.
    "sigreg_loss(z=T((31, 1), 'bfloat16', 'contiguous', 1.0, 451, '', True), slices=3, knots=12,"
    " t_max=0.00216, backend='cpu')",
    # squares past float32's least normal number
    "variance_covariance(z=T((11, 11), 'float32', 'contiguous', 6.1e-23, 60, '', True), eps=0.0,"
    " precision=None, unbiased=True, backend=None)",
    # No variance and no hinge.
    "vicreg_loss(x=T((3, 3), 'float32', 'contiguous', 1.0, 987, 'constant', True),"
    " y=T((3, 3), 'float32', 'transposed', 1.0, 469, '', True), convention='eb_jepa', margin=0.0,"
    " eps=0.0, backend='cpu')",
    # q . k is past float32 before it is scaled.
    "masked_attention(q=T((1, 3, 40), 'float32', 'contiguous', 5.1e+22, 571, '', True),"
    " k=T((1, 3, 40), 'float32', 'strided', 5.1e+22, 262, 'offset', False),"
    " v=T((1, 3, 40), 'float32', 'transposed', 5.1e+22, 904, '', True),"
    " mask=Ragged(I([0, 0, 1, 1], 'int64')) & FrameCausal(5, window=1), scale=0.0, backend='cpu')",
    # 1 - cosine, with a cosine near 1.
    "prediction_loss(pred=[T((1, 4, 31), 'float32', 'transposed', 1.0, 295, 'offset', True)],"
    " teacher=T((1, 5, 31), 'float32', 'contiguous', 1.0, 477, 'offset', False),"
    " index=[I([[0, 1, 3, 4]], 'int64')], kind='cosine', normalize_target=False, backend='cpu')",
    # A mean that is large beside the deviation.
    "modulated_layer_norm(x=T((5, 11, 2), 'float32', 'expanded', 1.0, 613, 'offset', True),"
    " shift=T((5, 2), 'float16', 'contiguous', 2.0, 904, '', True),"
    " scale=T((5, 2), 'float16', 'expanded', 2.0, 11, '', True), backend='cpu')",
    # A sum over tokens that are alike, whose weights add up to 0.
    "gated_residual(x=T((11, 1), 'float32', 'strided', 8.8e-17, 685, '', True),"
    " y=T((11, 1), 'float32', 'expanded', 8.8e-17, 624, '', True),"
    " gate=T((1,), 'float32', 'strided', 1.0, 361, '', True), backend=None)",
)  # fmt: skip


def test_every_public_function_is_drawn() -> None:
    """A new one needs a function of its name in tests/fuzz/op_<op>.py."""
    public = {name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))}
    assert public - set(runner.OPS) == {"accumulate", "patch", "unpatch"}
    modules = {name for name in kernels.__all__ if _is_module(getattr(kernels, name))}
    assert modules <= set(soak.steps()), "a new module needs a step in tests/fuzz/modules.py"


def _is_module(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, torch.nn.Module)


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


@pytest.mark.parametrize("line", BARELY)
def test_errors_of_float32_are_allowed(line) -> None:
    assert runner.hold(line) == "right"


@pytest.mark.parametrize("part", ["values", "gradients"])
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("barlow_twins_loss", "x=T((8, 5)), y=T((8, 5), seed=1)"),
        ("barlow_twins_loss", "x=T((3, 5)), y=T((3, 5), seed=1)"),
        ("sigreg_loss", "z=T((31, 7)), slices=5"),
        ("sigreg_loss", "z=T((31, 7), fill='constant'), slices=5"),
        ("gated_residual", "x=T((5, 7)), y=T((5, 7), seed=1), gate=T((7,), seed=2)"),
    ],
)
def test_errors_far_past_those_of_float32_are_not(monkeypatch, op, arguments, part) -> None:
    """The allowances are a few roundings: a loss or a gradient 3e-5 off is seen."""
    line = f"{op}({arguments}, backend='cpu')"
    assert runner.hold(line) == "right"
    whole = getattr(runner.vicreg_kernels, op)

    def coarse(**arguments):
        out = whole(**arguments)
        if arguments["backend"] != "cpu":
            return out
        off = 3e-5 * (out.detach() if part == "values" else out - out.detach())
        return out + off

    monkeypatch.setattr(runner.vicreg_kernels, op, coarse)
    with pytest.raises(runner.Fault, match=f"{part} 0: .*norm error"):
        runner.hold(line)


def test_an_int_past_int64_is_a_setting_like_its_float() -> None:
    for line in ("invariance_weight=2**70", "eps=2**70"):
        assert runner.hold(f"vicreg_loss{SAMPLE}, {line}, backend='cpu')") == "right"
