"""Tier 6: what torch expects of an op: opcheck, fullgraph compile, dynamic shapes, autocast."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tests.helpers import inductor, shapes
from tests.helpers.recorded_ops import RecordedOps
from tests.helpers.tolerances import differentiate
from vicreg_kernels.barlow import BarlowTwinsLoss, barlow_twins_loss


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two_views(shape, fused, dtype=torch.float32):
    return [shapes.randn(*shape, dtype=dtype, device=fused.device).requires_grad_() for _ in "xy"]


def loss(fused):
    """With a convention that scales the op's result."""
    return lambda x, y: barlow_twins_loss(x, y, convention="solo_learn", backend=fused.name)


def assert_same_outcome(actual, expected):
    """To the last bit: compiling moves the same op calls."""
    pairs = zip(actual.values + actual.gradients, expected.values + expected.gradients, strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("shape", "dtype", "needed"),
    [
        ((6, 9), torch.float32, (True, True)),
        ((9, 4), torch.float32, (False, True)),
        ((3, 3), torch.bfloat16, (True, False)),
        ((4, 9), torch.float16, (True, True)),
    ],
)
def test_opcheck(fused, shape, dtype, needed):
    pair = two_views(shape, fused, dtype)
    for view, wants in zip(pair, needed, strict=True):
        view.requires_grad_(wants)
    with RecordedOps() as ops:
        barlow_twins_loss(*pair, backend=fused.name).backward()
    assert [name for name, _ in ops.calls] == ["barlow_forward", "barlow_backward"]
    for name, args in ops.calls:  # autograd is outside the ops
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(getattr(torch.ops.vicreg_kernels, name).default, args)


@pytest.mark.parametrize(
    ("backend", "shape"), [(None, (6, 9)), (None, (9, 4)), ("reference", (6, 9))]
)
def test_fullgraph_equals_eager(fused, backend, shape):
    module = BarlowTwinsLoss(0.1, convention="monai", backend=backend or fused.name)
    pair = two_views(shape, fused)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same_outcome(differentiate(compiled, *pair), differentiate(module, *pair))


@pytest.mark.thorough
def test_inductor(fused):
    """The default compiler calls the ops as they are."""

    def function(x, y):
        return barlow_twins_loss(x, y, backend=fused.name)

    pair = two_views((12, 20), fused)
    with inductor.anew():
        actual = differentiate(torch.compile(function, fullgraph=True), *pair)
    assert_same_outcome(actual, differentiate(function, *pair))


def test_dynamic_shapes_compile_once_a_side(fused):
    """Each side compiles at its first shape, whatever the order."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss(fused), fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for shape in [(16, 48), (48, 16), (8, 30), (13, 13), (129, 17)]:
        pair = two_views(shape, fused)
        assert_same_outcome(differentiate(compiled, *pair), differentiate(loss(fused), *pair))
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[1], compilations


def test_settings_are_not_baked_into_the_graph_wrongly(fused):
    """A second weight recompiles or is an input; it never gives the first one's value."""

    def function(x, y, lambd):
        return barlow_twins_loss(x, y, lambd=lambd, backend=fused.name)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    pair = two_views((6, 9), fused)
    for lambd in (0.01, 2.0):
        assert torch.equal(compiled(*pair, lambd), function(*pair, lambd))


@pytest.mark.parametrize(
    ("shape", "half"), [((33, 70), torch.bfloat16), ((70, 33), torch.bfloat16)]
)
def test_autocast_does_not_lower(fused, shape, half):
    """Same bits with and without, forward and backward inside the region, compiled or not; and so
    the reference.
    """
    pair = two_views(shape, fused)
    plain = differentiate(loss(fused), *pair)

    def inside(x, y):
        with torch.autocast(fused.device, dtype=half):
            return loss(fused)(x, y)

    with torch.autocast(fused.device, dtype=half):
        assert_same_outcome(differentiate(loss(fused), *pair), plain)
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    assert_same_outcome(differentiate(compiled, *pair), plain)
    reference = barlow_twins_loss(*pair, backend="reference")
    with torch.autocast(fused.device, dtype=half):
        assert torch.equal(barlow_twins_loss(*pair, backend="reference"), reference)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_half_inputs(fused, half, compiled):
    """A float32 loss; gradients in the input's dtype."""
    function = loss(fused)
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    outcome = differentiate(function, *two_views((9, 14), fused, half))
    assert outcome.values[0].dtype == torch.float32
    assert outcome.values[0].dim() == 0
    assert {grad.dtype for grad in outcome.gradients} == {half}


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("read", ["grad", "backward"])
def test_second_derivative_is_a_clear_error(fused, weigh, read):
    """A gradient penalty must not lose its share in silence, next to a loss that has another way
    to the input, with and without a graph through the incoming gradient.
    """
    x, y = two_views((6, 9), fused)
    value = barlow_twins_loss(x, y, backend=fused.name)
    if weigh:
        value = value * x.sum()

    def penalise():
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        penalised = grad.square().sum() + x.square().sum()
        if read == "grad":
            torch.autograd.grad(penalised, x)
        else:
            penalised.backward()

    with pytest.raises(RuntimeError, match="differentiates once"):
        penalise()


def test_autograd_around_the_op(fused):
    """backward twice, a checkpoint, no gradient wanted, and an input changed in between."""
    x, y = two_views((6, 9), fused)
    value = barlow_twins_loss(x, y, backend=fused.name)
    first = torch.autograd.grad(value, (x, y), retain_graph=True)
    second = torch.autograd.grad(value, (x, y))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_same_outcome(
        differentiate(lambda x, y: checkpoint(loss(fused), x, y, use_reentrant=False), x, y),
        differentiate(loss(fused), x, y),
    )
    assert not loss(fused)(x.detach(), y.detach()).requires_grad
    hidden = x * 1.0
    value = barlow_twins_loss(hidden, y, backend=fused.name)
    hidden.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_module_copies_and_pickles(fused, duplicate):
    x, y = two_views((6, 9), fused)
    module = BarlowTwinsLoss(0.02, convention="solo_learn", eps=1e-3, backend=fused.name)
    assert torch.equal(duplicate(module)(x, y), module(x, y))
    assert not module.state_dict()
    assert "solo_learn" in repr(module)
    assert "0.02" in repr(module)


def test_the_hook_for_ranks(fused, monkeypatch):
    """Where process_group resolves to a group, `ranks.loss` gets the convention's numbers, and its
    result the convention's scale; a group of none is not asked.
    """
    from vicreg_kernels.barlow import api

    x, y = two_views((6, 9), fused)
    alone = loss(fused)(x, y)
    calls = []

    def ranks_loss(*args):
        calls.append(args)
        return x.new_tensor(40.0)

    monkeypatch.setattr(api.ranks, "loss", ranks_loss)
    assert torch.equal(loss(fused)(x, y), alone)
    assert not calls
    monkeypatch.setattr(api.distributed, "group_name", lambda asked: asked)
    monkeypatch.setattr(
        api.distributed, "check_on_all_ranks", lambda name, group, check, *args: check(*args)
    )
    value = barlow_twins_loss(x[:1], y[:1], convention="solo_learn", process_group="a group")
    assert value.item() == pytest.approx(1.0)
    (args,) = calls
    assert args[2:] == ((1e-5, 0.0, False, 5e-3, False), "ranks", "solo_learn", "a group")
