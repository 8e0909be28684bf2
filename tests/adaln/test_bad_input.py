"""Bad input of adaptive layer norm: the error names the argument and what it takes."""

from __future__ import annotations

import re

import pytest
import torch

from tests.helpers.recorded_ops import RecordedOps
from vicreg_kernels.adaln import gated_residual, modulated_layer_norm
from vicreg_kernels.core import dispatch


def z(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


X, V = z(2, 3, 5, 4), z(2, 3, 4)
TAKES = ["(2, 3, 4)", "(2, 3, 1, 4)", "(2, 3, 5, 4)"]
# name: (arguments, settings, exception, argument, words)
NORM = {
    "a list": (([1.0], V, V), {}, TypeError, "x", ["list"]),
    "dtype": ((X.int(), V, V), {}, TypeError, "x", ["int32", "bfloat16"]),
    "sparse": ((X.to_sparse(), V, V), {}, TypeError, "x", ["sparse"]),
    "one dimension": ((z(4), z(4), z(4)), {}, ValueError, "x", ["(4,)", "[..., T, D]"]),
    "no token": ((X[:, :, :0], V, V), {}, ValueError, "x", ["no elements"]),
    "no frame": ((X[:0], V[:0], V[:0]), {}, ValueError, "x", ["no elements"]),
    "one for each sample": ((X, V[:, 0], V[:, 0]), {}, ValueError, "shift", ["(2, 4)", *TAKES]),
    "one for all": ((X, V[0, 0], V[0, 0]), {}, ValueError, "shift", ["(4,)", *TAKES]),
    "D": ((X, V[..., :3], V), {}, ValueError, "shift", ["(2, 3, 3)", *TAKES]),
    "a frame too few": ((X, V[:, :2], V), {}, ValueError, "shift", ["(2, 2, 4)", *TAKES]),
    "scale's shape": ((X, V, V[:, :2]), {}, ValueError, "scale", ["(2, 2, 4)", *TAKES]),
    "two forms": ((X, V, V[:, :, None]), {}, ValueError, "scale", ["(2, 3, 1, 4)", "shift's"]),
    "two dtypes": ((X, V, V.half()), {}, TypeError, "scale", ["float16", "float32"]),
    "float64": ((X, V.double(), V.double()), {}, TypeError, "shift", ["float64", "float32"]),
    "x in float64": ((X.double(), V, V), {}, TypeError, "shift", ["float32", "float64"]),
    "a number": ((X, 1.0, V), {}, TypeError, "shift", ["float"]),
    "meta": ((X, V.to("meta"), V), {}, ValueError, "shift", ["meta", "cpu"]),
    "eps": ((X, V, V), {"eps": -1.0}, ValueError, "eps", ["-1.0", ">= 0"]),
    "NaN eps": ((X, V, V), {"eps": float("nan")}, ValueError, "eps", ["nan"]),
    "backend": ((X, V, V), {"backend": "gpu"}, ValueError, "backend", ["'gpu'", "'cpu'"]),
}
GATE = {
    "y's shape": ((X, X[:1], V), {}, ValueError, "y", ["(1, 3, 5, 4)", "(2, 3, 5, 4)"]),
    "y in float32": ((X.half(), X, V), {}, TypeError, "y", ["float32", "float16"]),
    "y in float64": ((X, X.double(), V), {}, TypeError, "y", ["float64", "float32"]),
    "y on meta": ((X, X.to("meta"), V), {}, ValueError, "y", ["meta", "cpu"]),
    "gate's shape": ((X, X, V[:, 0]), {}, ValueError, "gate", ["(2, 4)", *TAKES]),
    "gate's dtype": ((X, X, V.long()), {}, TypeError, "gate", ["int64"]),
    "a number": ((X, 1.0, V), {}, TypeError, "y", ["float"]),
}
ALL = [
    pytest.param(function, case, id=f"{function.__name__}-{name}")
    for function, table in ((modulated_layer_norm, NORM), (gated_residual, GATE))
    for name, case in table.items()
]


@pytest.mark.parametrize(("function", "case"), ALL)
def test_bad_input(function, case):
    """Arguments are checked before backends are looked for, runnable here or not."""
    args, settings, exception, argument, words = case
    for backend in (None, *dispatch.BACKENDS):
        with RecordedOps() as ops, pytest.raises(exception) as caught:
            function(*args, **{"backend": backend, **settings})
        message = str(caught.value)
        assert re.match(rf"{argument}: got .*", message), message
        for word in words:
            assert word in message, f"{word!r} not in {message!r}"
        assert ops.calls == []


def test_a_fused_backend_takes_no_float64():
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run adaln here: .*float64"):
        modulated_layer_norm(X.double(), V.double(), V.double(), backend="cpu")
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run gated_residual here"):
        gated_residual(X.double(), X.double(), V.double(), backend="cpu")
