"""Tier 6: what torch expects of an op: opcheck, fullgraph compile, dynamic shapes, autocast."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tests.helpers import inductor, shapes
from tests.helpers.recorded_ops import RecordedOps, words
from tests.helpers.tolerances import differentiate
from vicreg_kernels import (
    VCRegLoss,
    VICRegLoss,
    VICRegTerms,
    variance_covariance,
    vicreg_loss,
    vicreg_terms,
)

# [G, N, D] on both sides, square, and with fewer columns than are deflated.
OP_SHAPES = [(1, 6, 9), (3, 9, 5), (2, 2, 3)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two_views(shape, fused, dtype=torch.float32):
    return [shapes.randn(*shape, dtype=dtype, device=fused.device).requires_grad_() for _ in "xy"]


def assert_same_outcome(actual, expected):
    """To the last bit: compiling moves the same op calls."""
    pairs = zip(actual.values + actual.gradients, expected.values + expected.gradients, strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def op_calls(fused, shape, dtype, needed=(True, True)):
    """The arguments that a public call gives the forward op and the backward op."""
    views = two_views((shape[1], shape[0], shape[2]), fused, dtype)
    for view, wants in zip(views, needed, strict=True):
        view.requires_grad_(wants)
    with RecordedOps() as ops:
        vicreg_loss(*views, convention="lightly", backend=fused.name).backward()
    (forward, forward_args), (backward, backward_args) = ops.calls
    assert (forward, backward) == ("vicreg_forward", "vicreg_backward")
    assert forward_args[0].shape == shape
    return _detached(forward_args), _detached(backward_args)


def _detached(args):
    """Autograd is outside the ops."""
    return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)


@pytest.mark.triton_takes(lambda shape, dtype, **_: dtype == torch.float32 and shape[0] != 2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", OP_SHAPES)
def test_opcheck_two_views(fused, shape, dtype):
    forward, backward = op_calls(fused, shape, dtype)
    torch.library.opcheck(torch.ops.vicreg_kernels.vicreg_forward.default, forward)
    torch.library.opcheck(torch.ops.vicreg_kernels.vicreg_backward.default, backward)
    four = torch.randn(4).to(fused.device)
    torch.library.opcheck(torch.ops.vicreg_kernels.vicreg_backward.default, (four, *backward[1:]))


@pytest.mark.triton_takes(lambda **_: False)
@pytest.mark.parametrize("precision", [None, "tf32x3"])
def test_precision_reaches_the_ops_as_an_argument(fused, precision):
    """Forward and backward, eager and compiled; each precision has its own graph."""
    settings = {"precision": precision, "backend": fused.name}
    views = two_views((6, 9), fused)
    with RecordedOps() as ops:
        vicreg_loss(*views, **settings).backward()
    for name, args in ops.calls:
        assert fused.name in words(args)
        assert args[-1] == (precision == "tf32x3")
        torch.library.opcheck(getattr(torch.ops.vicreg_kernels, name).default, _detached(args))
    module = VICRegLoss(**settings)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same_outcome(differentiate(compiled, *views), differentiate(module, *views))


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_opcheck_one_gradient(fused, needed):
    _, backward = op_calls(fused, (2, 6, 9), torch.float32, needed)
    torch.library.opcheck(torch.ops.vicreg_kernels.vicreg_backward.default, backward)


@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 9, 6)])
def test_opcheck_one_view(fused, shape):
    z = shapes.randn(*shape, device=fused.device).requires_grad_()
    with RecordedOps() as ops:
        sum(variance_covariance(z, backend=fused.name)).backward()
    for name, args in ops.calls:
        torch.library.opcheck(getattr(torch.ops.vicreg_kernels, name).default, _detached(args))
    assert [name for name, _ in ops.calls] == ["vicreg_forward", "vicreg_backward"]


def functions(backend):
    """Every public entry, as a function of two views or of one, with its cotangents."""
    module = VICRegLoss(convention="eb_jepa", backend=backend)
    single = VCRegLoss(covariance_normalizer="d(d-1)", backend=backend)
    return {
        "vicreg_loss": (lambda x, y: vicreg_loss(x, y, backend=backend), 2, (1.0,)),
        "vicreg_terms": (
            lambda x, y: vicreg_terms(x, y, backend=backend),
            2,
            (0.5, 1.0, -2.0, 3.0),
        ),
        "variance_covariance": (
            lambda z: variance_covariance(z, backend=backend),
            1,
            (2.0, 3.0),
        ),
        "positions": (
            lambda x, y: vicreg_loss(
                x[:, None] * 1.0, y[:, None] * 1.0, convention="lightly", backend=backend
            ),
            2,
            (1.0,),
        ),
        "VICRegLoss": (module, 2, (1.0,)),
        "VCRegLoss": (single, 1, (1.0,)),
    }


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("name", functions(None))
def test_fullgraph_equals_eager(fused, name, shape):
    function, count, cotangents = functions(fused.name)[name]
    views = two_views(shape, fused)[:count]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_outcome(
        differentiate(compiled, *views, cotangents=cotangents),
        differentiate(function, *views, cotangents=cotangents),
    )


def test_fullgraph_of_the_reference(fused):
    function, _, cotangents = functions("reference")["vicreg_terms"]
    views = two_views((6, 9), fused)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_outcome(
        differentiate(compiled, *views, cotangents=cotangents),
        differentiate(function, *views, cotangents=cotangents),
    )


def test_inductor(fused):
    """The default compiler, with arithmetic around the op that it generates code for."""

    def function(x, y):
        return vicreg_loss(2.0 * x, y - 1.0, backend=fused.name)

    views = two_views((12, 20), fused)
    with inductor.anew():
        actual = differentiate(torch.compile(function, fullgraph=True), *views)
    expected = differentiate(function, *views)
    torch.testing.assert_close(actual.values, expected.values)
    torch.testing.assert_close(actual.gradients, expected.gradients)


def test_compiled_terms_keep_their_names(fused):
    compiled = torch.compile(
        lambda x, y: vicreg_terms(x, y, backend=fused.name), fullgraph=True, backend="aot_eager"
    )
    terms = compiled(*two_views((6, 9), fused))
    assert isinstance(terms, VICRegTerms)


@pytest.mark.parametrize(
    "sizes",
    [
        [(16, 48), (8, 30), (20, 21), (5, 6), (17, 129)],
        [(48, 16), (30, 7), (21, 21), (6, 5), (129, 17)],
    ],
    ids=["gram", "covariance"],
)
def test_dynamic_shapes_compile_once(fused, sizes):
    """One graph for all shapes on a side: the first call compiles, no other does."""
    function, _, cotangents = functions(fused.name)["vicreg_terms"]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for shape in sizes:
        views = two_views(shape, fused)
        assert_same_outcome(
            differentiate(compiled, *views, cotangents=cotangents),
            differentiate(function, *views, cotangents=cotangents),
        )
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0], compilations


def test_dynamic_shapes_across_the_sides(fused):
    """Each side compiles at its first shape, whatever the order."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, y: vicreg_loss(x, y, backend=fused.name),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    compilations = []
    for shape in [(16, 48), (48, 16), (8, 30), (30, 7), (13, 13)]:
        views = two_views(shape, fused)
        expected = vicreg_loss(*views, backend=fused.name)
        assert torch.equal(compiled(*views), expected)
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[1], compilations


def test_settings_are_not_baked_into_the_graph_wrongly(fused):
    """A second margin recompiles or is an input; it never gives the first one's value."""

    def function(x, y, margin):
        return vicreg_loss(x, y, margin=margin, backend=fused.name)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    views = two_views((6, 9), fused)
    for margin in (1.0, 2.0, 0.5):
        assert torch.equal(compiled(*views, margin), function(*views, margin))


@pytest.mark.parametrize("shape", [(33, 70), (70, 33)])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lower(fused, shape, half):
    """Same bits with and without, forward and backward inside the region."""
    function, _, cotangents = functions(fused.name)["vicreg_terms"]
    views = two_views(shape, fused)
    plain = differentiate(function, *views, cotangents=cotangents)
    with torch.autocast(fused.device, dtype=half):
        cast = differentiate(function, *views, cotangents=cotangents)
    assert_same_outcome(cast, plain)


def test_autocast_does_not_lower_when_compiled(fused):
    def function(x, y):
        with torch.autocast(fused.device, dtype=torch.bfloat16):
            return vicreg_loss(x, y, backend=fused.name)

    views = two_views((33, 70), fused)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain = differentiate(lambda x, y: vicreg_loss(x, y, backend=fused.name), *views)
    assert_same_outcome(differentiate(compiled, *views), plain)


def test_autocast_does_not_lower_the_reference():
    views = [torch.randn(33, 70, requires_grad=True) for _ in "xy"]
    plain = vicreg_loss(*views, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vicreg_loss(*views, backend="reference"), plain)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_half_inputs(fused, half, compiled):
    """A float32 loss and terms; gradients in the input's dtype."""
    function, _, cotangents = functions(fused.name)["vicreg_terms"]
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    outcome = differentiate(function, *two_views((9, 14), fused, half), cotangents=cotangents)
    assert {value.dtype for value in outcome.values} == {torch.float32}
    assert {grad.dtype for grad in outcome.gradients} == {half}


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("read", ["grad", "backward"])
def test_second_derivative_is_a_clear_error(fused, weigh, read):
    """A gradient penalty must not lose its share in silence, next to a loss that has another way
    to the input, with and without a graph through the incoming gradient.
    """
    x, y = two_views((6, 9), fused)
    loss = vicreg_loss(x, y, backend=fused.name)
    if weigh:
        loss = loss * x.sum()

    def penalise():
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        penalised = grad.square().sum() + x.square().sum()
        if read == "grad":
            torch.autograd.grad(penalised, x)
        else:
            penalised.backward()

    with pytest.raises(RuntimeError, match=r"differentiate twice|differentiates once"):
        penalise()


def test_backward_twice(fused):
    """retain_graph: the saved tensors are not consumed by the first backward."""
    x, y = two_views((6, 9), fused)
    loss = vicreg_loss(x, y, backend=fused.name)
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    second = torch.autograd.grad(loss, (x, y))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_input_changed_before_backward_is_caught(fused):
    x, y = two_views((6, 9), fused)
    hidden = x * 1.0
    loss = vicreg_loss(hidden, y, backend=fused.name)
    hidden.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_checkpoint(fused):
    function, _, cotangents = functions(fused.name)["vicreg_loss"]
    views = two_views((6, 9), fused)
    assert_same_outcome(
        differentiate(lambda x, y: checkpoint(function, x, y, use_reentrant=False), *views),
        differentiate(function, *views, cotangents=cotangents),
    )


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_modules_copy_and_pickle(fused, duplicate):
    x, y = two_views((6, 9), fused)
    pair = VICRegLoss(2.0, 3.0, margin=1.5, convention="solo_learn", backend=fused.name)
    single = VCRegLoss(3.0, 0.5, unbiased=False, backend=fused.name)
    assert torch.equal(duplicate(pair)(x, y), pair(x, y))
    assert torch.equal(duplicate(single)(x), single(x))
    assert not pair.state_dict()
    assert not single.state_dict()
    assert "solo_learn" in repr(pair)
    assert "1.5" in repr(pair)
