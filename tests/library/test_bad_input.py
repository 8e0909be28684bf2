"""Bad input: the error names the argument and what it takes, before any kernel runs."""

from __future__ import annotations

import re

import pytest
import torch

from tests.helpers.recorded_ops import RecordedOps
from vicreg_kernels import VCRegLoss, VICRegLoss, variance_covariance, vicreg_loss, vicreg_terms
from vicreg_kernels.core import dispatch


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


def z(*shape):
    """Not a constant, so that nothing but the check can complain."""
    return torch.randn(shape)


# name: (arguments, settings, exception, the start of the message, words it must contain)
PAIRS = {
    "shapes": ((z(4, 3), z(5, 3)), {}, ValueError, "y", ["(5, 3)", "(4, 3)"]),
    "dimensions": ((z(4, 3), z(4, 1, 3)), {}, ValueError, "y", ["(4, 1, 3)", "(4, 3)"]),
    "one row": ((z(1, 3), z(1, 3)), {}, ValueError, "x", ["1 row", "at least 2"]),
    "no rows": ((z(0, 3), z(0, 3)), {}, ValueError, "x", ["0 rows", "at least 2"]),
    "no columns": ((z(4, 0), z(4, 0)), {}, ValueError, "x", ["no elements"]),
    "no positions": (
        (z(4, 0, 3), z(4, 0, 3)),
        {"convention": "lightly"},
        ValueError,
        "x",
        ["no elements"],
    ),
    "1-D": ((z(4), z(4)), {}, ValueError, "x", ["(4,)", "[N, D]"]),
    "0-D": ((z(), z()), {}, ValueError, "x", ["[N, D]"]),
    "3-D": ((z(4, 2, 3), z(4, 2, 3)), {}, ValueError, "x", ["(4, 2, 3)", "[N, D]", "vicreg"]),
    "integers": (
        (ones(4, 3, dtype=torch.int64),) * 2,
        {},
        TypeError,
        "x",
        ["int64", "float32", "bfloat16", "float16", "float64"],
    ),
    "integers in y": ((z(4, 3), ones(4, 3, dtype=torch.int32)), {}, TypeError, "y", ["int32"]),
    "complex": ((z(4, 3).cfloat(),) * 2, {}, TypeError, "x", ["complex64", "float32"]),
    "dtypes": ((z(4, 3), z(4, 3).half()), {}, TypeError, "y", ["float16", "float32"]),
    "devices": ((z(4, 3), z(4, 3).to("meta")), {}, ValueError, "y", ["meta", "cpu"]),
    "sparse": ((z(4, 3).to_sparse(),) * 2, {}, TypeError, "x", ["sparse", "dense"]),
    "a list": (([[1.0, 2.0]], z(1, 2)), {}, TypeError, "x", ["list", "torch.Tensor"]),
    "nothing": ((z(4, 3), None), {}, TypeError, "y", ["NoneType", "torch.Tensor"]),
    "one dimension": (
        (z(4, 1), z(4, 1)),
        {"convention": "eb_jepa"},
        ValueError,
        "x",
        ["D = 1", "D >= 2"],
    ),
}
SETTINGS = {
    "convention": ({"convention": "vic"}, ValueError, "convention", ["'vic'", "'solo_learn'"]),
    "precision": ({"precision": "high"}, ValueError, "precision", ["'high'", "None", "'tf32x3'"]),
    "eps": ({"eps": -1e-4}, ValueError, "eps", ["-0.0001", ">= 0"]),
    "NaN eps": ({"eps": float("nan")}, ValueError, "eps", ["nan", ">= 0"]),
    "NaN margin": ({"margin": float("nan")}, ValueError, "margin", ["nan", "finite"]),
    "infinite margin": ({"margin": float("inf")}, ValueError, "margin", ["inf", "finite"]),
    "NaN weight": (
        {"covariance_weight": float("nan")},
        ValueError,
        "covariance_weight",
        ["nan", "finite", "None"],
    ),
}
PAIRS |= {name: ((z(4, 3), z(4, 3)), *expected) for name, expected in SETTINGS.items()}
SINGLES = {
    "one row": (z(1, 3), {}, ValueError, "z", ["1 row", "at least 2"]),
    "no groups": (z(0, 4, 3), {}, ValueError, "z", ["no elements"]),
    "1-D": (z(4), {}, ValueError, "z", ["[N, D]", "[G, N, D]"]),
    "4-D": (z(2, 2, 4, 3), {}, ValueError, "z", ["(2, 2, 4, 3)", "[G, N, D]"]),
    "integers": (ones(4, 3, dtype=torch.uint8), {}, TypeError, "z", ["uint8", "float32"]),
    "a float": (1.0, {}, TypeError, "z", ["float", "torch.Tensor"]),
    "normalizer": (
        z(4, 3),
        {"covariance_normalizer": "n"},
        ValueError,
        "covariance_normalizer",
        ["'n'", "'d(d-1)'"],
    ),
    "one dimension": (
        z(4, 1),
        {"covariance_normalizer": "d(d-1)"},
        ValueError,
        "z",
        ["D = 1", "D >= 2"],
    ),
    "precision": (z(4, 3), {"precision": 3}, ValueError, "precision", ["3", "'tf32x3'"]),
    "margin": (z(4, 3), {"margin": -1.0}, ValueError, "margin", ["-1.0", ">= 0"]),
}


@pytest.fixture(params=[None, *dispatch.BACKENDS])
def backend(request):
    """Every name, runnable here or not: arguments are checked before backends are looked for."""
    return request.param


def assert_refused(function, args, kwargs, exception, argument, words):
    with RecordedOps() as ops, pytest.raises(exception) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert re.match(rf"{argument}: got .*", message), message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
    assert ops.calls == []


@pytest.mark.parametrize("function", [vicreg_loss, vicreg_terms])
@pytest.mark.parametrize("case", PAIRS)
def test_two_views(function, case, backend):
    args, settings, exception, argument, words = PAIRS[case]
    settings = {**settings, "backend": backend}
    assert_refused(function, args, settings, exception, argument, words)


@pytest.mark.parametrize("case", SINGLES)
def test_one_view(case, backend):
    arg, settings, exception, argument, words = SINGLES[case]
    settings = {**settings, "backend": backend}
    assert_refused(variance_covariance, (arg,), settings, exception, argument, words)


@pytest.mark.parametrize("function", [vicreg_loss, vicreg_terms])
def test_unknown_backend(function):
    settings = {"backend": "gpu"}
    words = ["'gpu'", *dispatch.BACKENDS]
    assert_refused(function, (z(4, 3), z(4, 3)), settings, ValueError, "backend", words)
    assert_refused(variance_covariance, (z(4, 3),), settings, ValueError, "backend", words)


@pytest.mark.parametrize("name", [name for name in dispatch.BACKENDS if name != "reference"])
def test_backend_that_cannot_run_here(name):
    """Named, it is an error that says why, and never another backend in its place."""
    reason = dispatch.missing(name, "cpu", torch.float32)
    if reason is None:
        pytest.skip(f"{name} runs on CPU tensors here")
    with RecordedOps() as ops, pytest.raises(RuntimeError) as caught:
        vicreg_loss(z(4, 3), z(4, 3), backend=name)
    assert f"backend={name!r}" in str(caught.value)
    assert reason in str(caught.value)
    assert ops.calls == []


@pytest.mark.parametrize("name", [name for name in dispatch.BACKENDS if name != "reference"])
def test_fused_backends_take_no_float64(name):
    x = z(4, 3).double()
    with pytest.raises(RuntimeError, match=rf"backend='{name}'.*(float64|not|no CUDA)"):
        vicreg_loss(x, x, backend=name)


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"convention": "vic"}, "convention"),
        ({"eps": -1.0}, "eps"),
        ({"margin": float("nan")}, "margin"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_modules_refuse_at_construction(settings, argument):
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        VICRegLoss(**settings)
    if argument != "convention":
        with pytest.raises(ValueError, match=f"^{argument}: got"):
            VCRegLoss(**settings)


COMPILED = [name for name in PAIRS if name not in ("sparse", "a list", "nothing", "complex")]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", COMPILED)
def test_compiled(case):
    """With graph breaks allowed the same exception; with fullgraph=True the compiler's own, and in
    both the message that names the argument.
    """
    args, settings, exception, argument, words = PAIRS[case]

    def function(x, y):
        return vicreg_loss(x, y, **settings)

    for fullgraph in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=fullgraph, backend="eager")
        with pytest.raises(Exception, match=f"{argument}: got") as caught:
            compiled(*args)
        for word in words:
            assert word.split("'")[0] in str(caught.value)
        if not fullgraph:
            assert caught.type is exception
