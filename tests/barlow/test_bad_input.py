"""Bad input: the error names the argument and what it takes, before any kernel runs."""

from __future__ import annotations

import re

import pytest
import torch

from tests.helpers.recorded_ops import RecordedOps
from vicreg_kernels.barlow import BarlowTwinsLoss, barlow_twins_loss
from vicreg_kernels.core import dispatch


def z(*shape):
    """Not a constant, so that nothing but the check can complain."""
    return torch.randn(shape)


def integers(*shape):
    return torch.ones(shape, dtype=torch.int64)


# name: (arguments, settings, exception, the start of the message, words it must contain)
CASES = {
    "shapes": ((z(4, 3), z(5, 3)), {}, ValueError, "y", ["(5, 3)", "(4, 3)"]),
    "one row": ((z(1, 3), z(1, 3)), {}, ValueError, "x", ["1 row", "at least 2"]),
    "no rows": ((z(0, 3), z(0, 3)), {}, ValueError, "x", ["0 rows", "at least 2"]),
    "no columns": ((z(4, 0), z(4, 0)), {}, ValueError, "x", ["no elements"]),
    "1-D": ((z(4), z(4)), {}, ValueError, "x", ["(4,)", "[N, D]"]),
    "3-D": ((z(4, 2, 3), z(4, 2, 3)), {}, ValueError, "x", ["(4, 2, 3)", "[N, D]"]),
    "3-D in y": ((z(4, 3), z(4, 1, 3)), {}, ValueError, "y", ["(4, 1, 3)", "[N, D]"]),
    "integers": ((integers(4, 3),) * 2, {}, TypeError, "x", ["int64", "float32", "bfloat16"]),
    "integers in y": ((z(4, 3), integers(4, 3)), {}, TypeError, "y", ["int64", "float16"]),
    "complex": ((z(4, 3).cfloat(),) * 2, {}, TypeError, "x", ["complex64", "float64"]),
    "dtypes": ((z(4, 3), z(4, 3).half()), {}, TypeError, "y", ["float16", "float32"]),
    "devices": ((z(4, 3), z(4, 3).to("meta")), {}, ValueError, "y", ["meta", "cpu"]),
    "sparse": ((z(4, 3).to_sparse(),) * 2, {}, TypeError, "x", ["sparse", "dense"]),
    "a list": (([[1.0, 2.0]], z(1, 2)), {}, TypeError, "x", ["list", "torch.Tensor"]),
    "nothing": ((z(4, 3), None), {}, TypeError, "y", ["NoneType", "torch.Tensor"]),
}
SETTINGS = {
    "convention": ({"convention": "barlow"}, "convention", ["'barlow'", "'barlow_twins'"]),
    "eps": ({"eps": -1e-4}, "eps", ["-0.0001", ">= 0", "None"]),
    "NaN eps": ({"eps": float("nan")}, "eps", ["nan", ">= 0"]),
    "infinite eps": ({"eps": float("inf")}, "eps", ["inf", "finite"]),
    "NaN lambd": ({"lambd": float("nan")}, "lambd", ["nan", "finite", "None"]),
    "infinite lambd": ({"lambd": float("inf")}, "lambd", ["inf", "finite"]),
    "backend": ({"backend": "gpu"}, "backend", ["'gpu'", *dispatch.BACKENDS]),
}
CASES |= {
    name: ((z(4, 3), z(4, 3)), settings, ValueError, argument, words)
    for name, (settings, argument, words) in SETTINGS.items()
}


@pytest.mark.parametrize("backend", [None, *dispatch.BACKENDS])
@pytest.mark.parametrize("case", CASES)
def test_refused(case, backend):
    """On every backend, runnable here or not: arguments are checked before backends are found."""
    args, settings, exception, argument, words = CASES[case]
    with RecordedOps() as ops, pytest.raises(exception) as caught:
        barlow_twins_loss(*args, **{"backend": backend, **settings})
    message = str(caught.value)
    assert re.match(rf"{argument}: got .*", message), message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
    assert ops.calls == []


@pytest.mark.parametrize("case", SETTINGS)
def test_module_refuses_at_construction(case):
    settings, argument, _ = SETTINGS[case]
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        BarlowTwinsLoss(**settings)


@pytest.mark.parametrize("name", [name for name in dispatch.BACKENDS if name != "reference"])
def test_backend_that_cannot_run_here(name):
    """Named, it is an error that says why, and never another backend in its place."""
    with pytest.raises(RuntimeError, match=rf"backend='{name}'.*(float64|not|no CUDA)"):
        barlow_twins_loss(z(4, 3).double(), z(4, 3).double(), backend=name)
    reason = dispatch.missing(name, "cpu", torch.float32)
    if reason is not None:
        with RecordedOps() as ops, pytest.raises(RuntimeError) as caught:
            barlow_twins_loss(z(4, 3), z(4, 3), backend=name)
        assert reason in str(caught.value)
        assert ops.calls == []


def test_process_group_that_is_none():
    with pytest.raises(TypeError, match=r"^process_group: got int"):
        barlow_twins_loss(z(4, 3), z(4, 3), process_group=3)
    if torch.distributed.is_available() and not torch.distributed.is_initialized():
        with pytest.raises(RuntimeError, match=r"^process_group: got True"):
            barlow_twins_loss(z(4, 3), z(4, 3), process_group=True)
    expected = barlow_twins_loss(*(views := (z(4, 3), z(4, 3))))
    assert torch.equal(barlow_twins_loss(*views, process_group=False), expected)


COMPILED = ["shapes", "one row", "3-D", "integers", "dtypes", "convention", "NaN lambd"]


@pytest.mark.parametrize("case", COMPILED)
def test_compiled(case):
    """The compiler's own exception, with the message that names the argument."""
    args, settings, _, argument, words = CASES[case]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: barlow_twins_loss(x, y, **settings), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match=f"{argument}: got") as caught:
        compiled(*args)
    for word in words:
        assert word.split("'")[0] in str(caught.value)
