"""Bad input of the tokens ops: the error names the argument and what it takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.helpers.recorded_ops import RecordedOps
from vicreg_kernels.core import dispatch
from vicreg_kernels.tokens import (
    PredictionLoss,
    assemble_tokens,
    gather_tokens,
    prediction_loss,
    scatter_tokens,
)


def z(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


def i(*rows):
    return torch.tensor(rows)


X, INDEX, FLAT = z(2, 5, 3), i([0, 4], [1, 2]), i(0, 4, 1)
# name: (arguments, settings, exception, argument, words)
GATHER = {
    "a list": (([1.0], INDEX), {}, TypeError, "x", ["list"]),
    "dtype": ((X.int(), INDEX), {}, TypeError, "x", ["int32", "bfloat16"]),
    "sparse": ((X.to_sparse(), INDEX), {}, TypeError, "x", ["sparse"]),
    "dimensions": ((z(5, 3), INDEX), {}, ValueError, "x", ["(5, 3)", "[B, T, D]"]),
    "empty batch": ((z(0, 5, 3), i([0])[:0]), {}, ValueError, "x", ["no elements"]),
    "index dtype": ((X, INDEX.float()), {}, TypeError, "index", ["float32", "int64"]),
    "index shape": ((X, FLAT), {}, ValueError, "index", ["(3,)", "offsets"]),
    "index batch": ((X, INDEX[:1]), {}, ValueError, "index", ["1 samples", "2"]),
    "index device": ((X, INDEX.to("meta")), {}, ValueError, "index", ["meta", "cpu"]),
    "offsets start": ((X, FLAT), {"offsets": [1, 2, 3]}, ValueError, "offsets", ["1 first"]),
    "offsets fall": ((X, FLAT), {"offsets": [0, 4, 3]}, ValueError, "offsets", ["3 after 4"]),
    "offsets end": ((X, FLAT), {"offsets": [0, 1, 2]}, ValueError, "offsets", ["2 last", "3"]),
    "offsets count": ((X, FLAT), {"offsets": [0, 3]}, ValueError, "offsets", ["2 numbers", "3"]),
    "offsets dtype": ((X, FLAT), {"offsets": z(3)}, TypeError, "offsets", ["float32"]),
    "offsets shape": ((X, FLAT), {"offsets": i([0, 3])}, ValueError, "offsets", ["(1, 2)"]),
    "packed shape": ((X, INDEX), {"offsets": [0, 2, 4]}, ValueError, "index", ["(2, 2)"]),
}
SCATTER = {
    "dimensions": ((z(5, 3), INDEX, 5), {}, ValueError, "tokens", ["(5, 3)"]),
    "length of a float": ((z(2, 2, 3), INDEX, 5.0), {}, TypeError, "length", ["float", "int"]),
    "length of a tensor": ((z(2, 2, 3), INDEX, i(5)), {}, TypeError, "length", ["Tensor"]),
    "length of a bool": ((z(2, 2, 3), INDEX, True), {}, TypeError, "length", ["bool"]),
    "length past int64": ((z(2, 2, 3), INDEX, 2**70), {}, ValueError, "length", ["2^63"]),
    "length": ((z(2, 2, 3), INDEX, 0), {}, ValueError, "length", ["0", "at least 1"]),
    "shapes": ((z(2, 3, 3), INDEX, 5), {}, ValueError, "index", ["(2, 2)", "(2, 3)"]),
    "empty": ((z(2, 2, 0), INDEX, 5), {}, ValueError, "tokens", ["no elements"]),
}
P = z(2, 2, 3)
LOSS = {
    "teacher grad": (
        (P, z(2, 5, 3, requires_grad=True), INDEX), {}, ValueError, "teacher", ["no_grad"],
    ),
    "teacher shape": ((P, z(5, 3), INDEX), {}, ValueError, "teacher", ["(5, 3)"]),
    "dims": ((z(2, 2, 4), X, INDEX), {}, ValueError, "pred", ["D = 4", "D = 3"]),
    "dtypes": ((P.double(), X, INDEX), {}, TypeError, "pred", ["float64", "float32"]),
    "rows": ((z(2, 3, 3), X, INDEX), {}, ValueError, "index", ["(2, 2)", "(2, 3)"]),
    "batch": ((z(3, 1, 3), X, i([0], [1], [2])), {}, ValueError, "index", ["3 samples", "2"]),
    "no tokens": ((P[:, :0], X, INDEX[:, :0]), {}, ValueError, "index", ["no tokens"]),
    "no packed tokens": (
        (z(0, 3), X, FLAT[:0]), {"offsets": [0, 0, 0]}, ValueError, "index", ["no tokens"],
    ),
    "kind": ((P, X, INDEX), {"kind": "huber"}, ValueError, "kind", ["'huber'", "'smooth_l1'"]),
    "beta": ((P, X, INDEX), {"beta": -1.0}, ValueError, "beta", ["-1.0"]),
    "eps": ((P, X, INDEX), {"eps": float("nan")}, ValueError, "eps", ["nan"]),
    "reduction": ((P, X, INDEX), {"reduction": "sum"}, ValueError, "reduction", ["'sum'"]),
    "a number": ((1.0, X, INDEX), {}, TypeError, "pred", ["float"]),
    "lists": (([P, P], X, [INDEX]), {}, ValueError, "index", ["1", "2"]),
    "no masks": ((P, X, []), {}, ValueError, "index", ["no masks"]),
    "unequal masks": ((P, X, [INDEX, INDEX[:, :1]]), {}, ValueError, "index", ["equal"]),
    "mask-major": ((z(3, 2, 3), X, [INDEX, INDEX]), {}, ValueError, "pred", ["M B = 4"]),
    "list offsets": (
        ([P], X, [INDEX]), {"offsets": [[0], [1]]}, ValueError, "offsets", ["1 masks"],
    ),
}  # fmt: skip
T = z(3)
ASSEMBLE = {
    "context": ((z(5, 3), INDEX, T, INDEX), {}, ValueError, "context", ["(5, 3)"]),
    "rows": ((z(2, 3, 3), INDEX, T, INDEX), {}, ValueError, "context_index", ["(2, 2)", "(2, 3)"]),
    "targets": ((P, INDEX, T, i([0], [1], [2])), {}, ValueError, "target_index", ["3 samples"]),
    "token": ((P, INDEX, z(2, 3), INDEX), {}, ValueError, "mask_token", ["(2, 3)"]),
    "token D": ((P, INDEX, z(4), INDEX), {}, ValueError, "mask_token", ["D = 4", "D = 3"]),
    "token dtype": ((P, INDEX, T.double(), INDEX), {}, TypeError, "mask_token", ["float64"]),
    "table": ((P, INDEX, T, INDEX), {"positions": T}, ValueError, "positions", ["(3,)"]),
    "one offsets": (
        (P, INDEX, T, INDEX), {"context_offsets": [0, 1]}, ValueError, "target_offsets", ["None"],
    ),
    "offsets on meta": (
        (z(3, 3), FLAT, T, FLAT),
        {"context_offsets": torch.tensor([0, 3], device="meta"), "target_offsets": [0, 3]},
        ValueError, "context_offsets", ["meta"],
    ),
    "offsets": (
        (z(3, 3), FLAT, T, FLAT), {"context_offsets": [0, 1, 3], "target_offsets": [0, 3]},
        ValueError, "target_offsets", ["2 numbers"],
    ),
    "lists": ((P, INDEX, T, [INDEX, INDEX[:, :1]]), {}, ValueError, "target_index", ["equal"]),
    "nothing": (
        (P[:, :0], INDEX[:, :0], T, INDEX[:, :0]), {}, ValueError, "context_index", ["no tokens"],
    ),
}  # fmt: skip
ALL = [
    pytest.param(function, case, id=f"{function.__name__}-{name}")
    for function, table in (
        (gather_tokens, GATHER),
        (scatter_tokens, SCATTER),
        (prediction_loss, LOSS),
        (assemble_tokens, ASSEMBLE),
    )
    for name, case in table.items()
]
# What needs the values: name: (function, arguments, settings, argument, words)
VALUES = {
    "gather high": (gather_tokens, (X, i([0, 5], [1, 2])), {}, "index", ["5", "0 to 4"]),
    "gather negative": (gather_tokens, (X, i([0, 4], [-1, 2])), {}, "index", ["-1", "0 to 4"]),
    "gather packed": (gather_tokens, (X, i(0, 9)), {"offsets": [0, 1, 2]}, "index", ["9"]),
    "scatter high": (scatter_tokens, (P, i([0, 7], [1, 2]), 7), {}, "index", ["7", "0 to 6"]),
    "scatter twice": (scatter_tokens, (P, i([0, 1], [4, 4]), 7), {}, "index", ["4", "twice"]),
    "scatter packed twice": (
        scatter_tokens, (P[0], i(3, 3), 7), {"offsets": [0, 2]}, "index", ["3", "twice"],
    ),
    "loss high": (prediction_loss, (P, X, i([0, 5], [1, 2])), {}, "index", ["5", "0 to 4"]),
    "loss negative": (prediction_loss, (P, X, i([0, -5], [1, 2])), {}, "index", ["-5"]),
    "order negative": (
        assemble_tokens, (P, INDEX, T, i([0, -1], [1, 2])), {}, "target_index", ["-1"],
    ),
    "table": (
        assemble_tokens, (P, i([0, 6], [1, 2]), T, INDEX), {"positions": z(5, 3)},
        "context_index", ["6", "0 to 4"],
    ),
}  # fmt: skip


@pytest.fixture(params=[None, *dispatch.BACKENDS])
def backend(request):
    """Every name, runnable here or not: arguments are checked before backends are looked for."""
    return request.param


def assert_refused(call, exception, argument, words, ops_allowed=()):
    with RecordedOps() as ops, pytest.raises(exception) as caught:
        call()
    message = str(caught.value)
    assert re.match(rf"{argument}: (got|takes) .*", message), message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
    assert [name for name, _ in ops.calls if name not in ops_allowed] == []


@pytest.mark.parametrize(("function", "case"), ALL)
def test_arguments(function, case, backend):
    args, settings, exception, argument, words = case
    assert_refused(lambda: function(*args, **settings, backend=backend), exception, argument, words)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("case", VALUES)
@pytest.mark.parametrize("wide", [torch.int32, torch.int64])
def test_values(case, name, wide):
    function, args, settings, argument, words = VALUES[case]
    if dispatch.missing(name, "cpu", torch.float32) is not None:
        pytest.skip(f"{name} is not built")
    args = [
        a.to(wide) if isinstance(a, torch.Tensor) and not a.is_floating_point() else a for a in args
    ]
    with pytest.raises(ValueError, match=rf"^{argument}: got") as caught:
        function(*args, **settings, backend=name)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("case", VALUES)
def test_values_when_compiled(case):
    """The compiled CPU kernels check for themselves."""
    if dispatch.missing("cpu", "cpu", torch.float32) is not None:
        pytest.skip("cpu is not built")
    function, args, settings, argument, _ = VALUES[case]
    torch._dynamo.reset()

    def call(*tensors):
        made = function(*tensors, *args[len(tensors) :], **settings, backend="cpu")
        return made.tokens if isinstance(made, tuple) else made

    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=rf"^{argument}: got"):
        compiled(*tensors)


@pytest.mark.parametrize("offsets", [[1, 2, 3], [0, 4, 3], [0, 1, 2]])
def test_offsets_when_compiled(offsets):
    if dispatch.missing("cpu", "cpu", torch.float32) is not None:
        pytest.skip("cpu is not built")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, i, o: gather_tokens(x, i, offsets=o, backend="cpu"),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(ValueError, match=r"^offsets: got"):
        compiled(X, FLAT, torch.tensor(offsets))


@pytest.mark.parametrize(
    ("settings", "argument"),
    [({"kind": "x"}, "kind"), ({"beta": -1.0}, "beta"), ({"backend": "gpu"}, "backend")],
)
def test_module_refuses_at_construction(settings, argument):
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        PredictionLoss(**settings)


@pytest.mark.parametrize("name", [name for name in dispatch.BACKENDS if name != "reference"])
def test_fused_backends_take_no_float64(name):
    with pytest.raises(RuntimeError, match=rf"backend='{name}'.*(float64|not|no CUDA)"):
        gather_tokens(X.double(), INDEX, backend=name)


def test_an_empty_mask_is_an_empty_tensor():
    x = X.clone().requires_grad_()
    gathered = gather_tokens(x, INDEX[:, :0])
    assert gathered.shape == (2, 0, 3)
    assert not torch.autograd.grad(gathered.sum(), x)[0].any()
    assert (scatter_tokens(gathered, INDEX[:, :0], 4, fill=2.0) == 2.0).all()


def test_the_teacher_may_want_a_gradient_where_none_is_recorded():
    with torch.no_grad():
        prediction_loss(P, z(2, 5, 3, requires_grad=True), INDEX)


def test_debug_mode_checks_on_every_backend():
    """VICREG_KERNELS_DEBUG=1 turns on what a GPU would otherwise not wait for."""
    program = "from vicreg_kernels.core import dispatch; from vicreg_kernels.tokens import checks;"
    program += "import torch; z = torch.zeros(1);"
    program += "print(dispatch.DEBUG, checks.wanted('cuda', z.to('meta')))"
    for value, expected in (("1", "True True"), ("0", "False False")):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "VICREG_KERNELS_DEBUG": value},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == expected


@pytest.mark.parametrize("name", ["reference", None])
def test_what_can_change_is_checked_in_every_call(name):
    """Values, host offsets and whether the teacher wants a gradient, after a call that was good."""
    x, index, flat, offsets = X.clone(), INDEX.clone(), FLAT.clone(), [0, 1, 3]
    good = [
        lambda: gather_tokens(x, index, backend=name),
        lambda: gather_tokens(x, flat, offsets=offsets, backend=name),
        lambda: scatter_tokens(P, index, 5, backend=name),
        lambda: prediction_loss(P, x, index, backend=name),
        lambda: assemble_tokens(P, index, T, index, positions=z(5, 3), backend=name),
    ]
    for call in good:
        call()
    index[1, 1] = 7
    flat[2] = 7
    for call in good:
        with pytest.raises(ValueError, match="index: got 7"):
            call()
    index[1, 1], flat[2], offsets[2] = 2, 1, 4
    with pytest.raises(ValueError, match="offsets: got 4 last"):
        good[1]()
    x.requires_grad_()
    with pytest.raises(ValueError, match="teacher: got a tensor that requires grad"):
        good[3]()
    with torch.no_grad():
        good[3]()


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_fill_that_the_dtype_does_not_hold_is_named(backend):
    rows, index = torch.randn(1, 2, 4).half(), torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match=r"fill: got 1000000.0, takes a number that torch.float16"):
        scatter_tokens(rows, index, 3, fill=1e6, backend=backend)
    for fill in (65504.0, float("inf"), float("-inf")):
        assert (scatter_tokens(rows, index, 3, fill=fill, backend=backend)[0, 2] == fill).all()
