"""Bad input: the error names the argument and what it takes, before any kernel runs."""

from __future__ import annotations

import re

import pytest
import torch

from tests.helpers.recorded_ops import RecordedOps
from vicreg_kernels.core import dispatch
from vicreg_kernels.sigreg import LeJEPALoss, SIGRegLoss, sigreg_directions, sigreg_loss
from vicreg_kernels.sigreg.conventions import CONVENTIONS


def z(*shape):
    return torch.randn(shape)


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


# name: (z, settings, exception, argument, words that the message must contain)
CASES = {
    "1-D": (z(4), {}, ValueError, "z", ["(4,)", "[N, D]", "[G, N, D]"]),
    "4-D": (z(2, 2, 4, 3), {}, ValueError, "z", ["(2, 2, 4, 3)", "[N, D]"]),
    "one row": (z(1, 3), {}, ValueError, "z", ["1 rows", "at least 2"]),
    "one row a view": (z(4, 1, 3), {}, ValueError, "z", ["1 rows", "at least 2"]),
    "no columns": (z(4, 0), {}, ValueError, "z", ["no elements"]),
    "no groups": (z(0, 4, 3), {}, ValueError, "z", ["no elements"]),
    "integers": (ones(4, 3, dtype=torch.int64), {}, TypeError, "z", ["int64", "float32"]),
    "complex": (z(4, 3).cfloat(), {}, TypeError, "z", ["complex64", "float32"]),
    "sparse": (z(4, 3).to_sparse(), {}, TypeError, "z", ["sparse", "dense"]),
    "a list": ([[1.0, 2.0]], {}, TypeError, "z", ["list", "torch.Tensor"]),
}
SETTINGS = {
    "convention": ({"convention": "sigreg"}, ValueError, "convention", ["'sigreg'", *CONVENTIONS]),
    "slices": ({"slices": 0}, ValueError, "slices", ["0", "at least 1"]),
    "slices past int64": ({"slices": 2**70}, ValueError, "slices", ["2^63"]),
    "half slices": ({"slices": 1.5}, TypeError, "slices", ["float", "int"]),
    "one knot": ({"knots": 1}, ValueError, "knots", ["1", "at least 2"]),
    "a bool": ({"knots": True}, TypeError, "knots", ["bool", "int"]),
    "a tensor": ({"knots": ones(3)}, TypeError, "knots", ["Tensor", "list"]),
    "falling": ({"knots": [0.0, 2.0, 1.0]}, ValueError, "knots", ["2.0, 1.0", "ascending"]),
    "negative": ({"knots": [-1.0, 1.0]}, ValueError, "knots", ["-1.0", ">= 0"]),
    "infinite": ({"knots": [0.0, float("inf")]}, ValueError, "knots", ["inf", "finite"]),
    "NaN": ({"knots": [0.0, float("nan")]}, ValueError, "knots", ["nan", "finite"]),
    "many": ({"knots": 66}, ValueError, "knots", ["65", "at most 64"]),
    "more than memory holds": ({"knots": 2**70}, ValueError, "knots", ["at most 64"]),
    "two rules": ({"knots": [0.0, 1.0], "t_max": 1.0}, ValueError, "t_max", ["1.0", "None"]),
    "t_max": ({"t_max": 0.0}, ValueError, "t_max", ["0.0", "> 0"]),
    "NaN t_max": ({"t_max": float("nan")}, ValueError, "t_max", ["nan", "finite"]),
    "seed": ({"seed": 2**63}, ValueError, "seed", [str(2**63), "64-bit"]),
    "float seed": ({"seed": 1.0}, TypeError, "seed", ["float", "int"]),
    "step": ({"step": -1}, ValueError, "step", ["-1", "0 <= step"]),
    "float step": ({"step": 1.0}, TypeError, "step", ["float", "int64 tensor"]),
    "step's dtype": ({"step": torch.tensor(1.0)}, ValueError, "step", ["float32", "int64"]),
    "step's shape": ({"step": ones(1).long()}, ValueError, "step", ["(1,)", "0-d"]),
    "step's device": (
        {"step": torch.tensor(1, device="meta")},
        ValueError,
        "step",
        ["meta", "cpu"],
    ),
    "directions": ({"directions": z(4, 5)}, ValueError, "directions", ["(4, 5)", "D = 3"]),
    "no directions": ({"directions": z(3, 0)}, ValueError, "directions", ["(3, 0)", "[D, M]"]),
    "learnt": (
        {"directions": z(3, 5).requires_grad_()},
        ValueError,
        "directions",
        ["requires grad", "constants"],
    ),
    "number": ({"directions": z(3, 5), "slices": 4}, ValueError, "slices", ["4", "5", "None"]),
    "directions' dtype": (
        {"directions": ones(3, 5, dtype=torch.int32)},
        TypeError,
        "directions",
        ["int32", "float32"],
    ),
    "directions' device": (
        {"directions": z(3, 5).to("meta")},
        ValueError,
        "directions",
        ["meta", "cpu"],
    ),
    "directions' type": ({"directions": [1.0]}, TypeError, "directions", ["list", "Tensor"]),
    "backend": ({"backend": "gpu"}, ValueError, "backend", ["'gpu'", *dispatch.BACKENDS]),
}
CASES |= {name: (z(4, 3), *expected) for name, expected in SETTINGS.items()}
LEJEPA = {
    "2-D": ((z(4, 3),), {}, ValueError, "z", ["(4, 3)", "[V, N, D]"]),
    "views": ((z(2, 4, 3), 3), {}, ValueError, "global_views", ["3", "1 to 2"]),
    "no views": ((z(2, 4, 3), 0), {}, ValueError, "global_views", ["0", "1 to 2"]),
    "no target": ((z(4, 3),), {"predicted": z(4, 3)}, TypeError, "target", ["NoneType", "Tensor"]),
    "target's shape": (
        (z(4, 3),),
        {"predicted": z(4, 3), "target": z(1, 3)},
        ValueError,
        "target",
        ["(1, 3)", "(4, 3)"],
    ),
    "both": (
        (z(2, 4, 3), 1),
        {"predicted": z(4, 3), "target": z(4, 3)},
        ValueError,
        "global_views",
        ["1", "None"],
    ),
}


def assert_refused(function, args, kwargs, exception, argument, words):
    with RecordedOps() as ops, pytest.raises(exception) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert re.match(rf"{argument}: got .*", message), message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
    assert ops.calls == []


@pytest.mark.parametrize("backend", [None, *dispatch.BACKENDS])
@pytest.mark.parametrize("case", CASES)
def test_loss(case, backend):
    """Every backend, runnable here or not: arguments are checked before backends are looked for."""
    arg, settings, exception, argument, words = CASES[case]
    settings = {"backend": backend, **settings}
    assert_refused(sigreg_loss, (arg,), settings, exception, argument, words)


@pytest.mark.parametrize("case", LEJEPA)
def test_lejepa(case):
    args, settings, exception, argument, words = LEJEPA[case]
    module = LeJEPALoss(backend="reference")
    assert_refused(module, args, settings, exception, argument, words)
    assert module.sigreg.step == 0


@pytest.mark.parametrize("name", [name for name in dispatch.BACKENDS if name != "reference"])
def test_backend_that_cannot_run_here(name):
    """Named, it is an error that says why, and never another backend in its place."""
    reason = dispatch.missing(name, "cpu", torch.float32)
    with RecordedOps() as ops:
        if reason is not None:
            with pytest.raises(RuntimeError, match=f"backend='{name}'") as caught:
                sigreg_loss(z(4, 3), backend=name)
            assert reason in str(caught.value)
        with pytest.raises(RuntimeError, match=rf"backend='{name}'.*(float64|not|no CUDA)"):
            sigreg_loss(z(4, 3).double(), backend=name)
    assert ops.calls == []


MODULE_SETTINGS = [
    name for name in SETTINGS if name not in ("number",) and not name.startswith(("step", "direc"))
]


@pytest.mark.parametrize("name", MODULE_SETTINGS)
def test_modules_refuse_at_construction(name):
    settings, exception, argument, _ = SETTINGS[name]
    if argument in ("step", "directions"):
        pytest.skip("an argument of forward")
    for module in (SIGRegLoss, LeJEPALoss):
        with pytest.raises(exception, match=f"^{argument}: got"):
            module(**settings)


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"weighting": "mean"}, "weighting"),
        ({"weight": -0.1}, "weight"),
        ({"weight": 1.5}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"weight": float("inf"), "weighting": "sum"}, "weight"),
    ],
)
def test_lejepa_refuses_at_construction(settings, argument):
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        LeJEPALoss(**settings)


@pytest.mark.parametrize(
    ("args", "settings", "exception", "argument"),
    [
        ((0, 4), {}, ValueError, "dim"),
        ((3.0, 4), {}, TypeError, "dim"),
        ((3, 0), {}, ValueError, "slices"),
        ((3, None), {}, TypeError, "slices"),
        ((3, 4), {"step": -1}, ValueError, "step"),
        ((3, 4), {"step": torch.tensor(1), "device": "meta"}, ValueError, "step"),
        ((3, 4), {"seed": "one"}, TypeError, "seed"),
        ((3, 4), {"backend": "gpu"}, ValueError, "backend"),
    ],
)
def test_directions(args, settings, exception, argument):
    assert_refused(sigreg_directions, args, settings, exception, argument, [])


@pytest.mark.parametrize("case", ["1-D", "one row", "falling", "step", "learnt", "directions"])
def test_compiled(case):
    """With graph breaks allowed the same exception; with fullgraph=True the compiler's own, and in
    both the message that names the argument.
    """
    arg, settings, exception, argument, _ = CASES[case]
    for fullgraph in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda z: sigreg_loss(z, **settings), fullgraph=fullgraph, backend="eager"
        )
        with pytest.raises(Exception, match=f"{argument}: got") as caught:
            compiled(arg)
        if not fullgraph:
            assert caught.type is exception


def test_directions_of_more_dimensions_than_an_int64_counts() -> None:
    with pytest.raises(ValueError, match=r"^dim: got \d+, takes .* less than 2\^63"):
        sigreg_directions(2**70, 3)
