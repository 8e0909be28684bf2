"""Tier 6: the tokens ops under torch: opcheck, fullgraph compile, dynamic shapes, autocast."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import inductor
from tests.helpers.recorded_ops import RecordedOps, words
from tests.tokens.cases import KINDS, draw, mask, run, same
from vicreg_kernels.tokens import (
    PredictionLoss,
    assemble_tokens,
    gather_tokens,
    prediction_loss,
    scatter_tokens,
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def cases(fused, batch=2, tokens=9, kept=4, dim=6):
    """name -> (function of float leaves and integer tensors, leaves, integer tensors)."""
    where = {"device": fused.device}
    name = fused.name
    dense, packed = mask(batch, tokens, kept, **where), mask(batch, tokens, [kept, 2], **where)
    rest = mask(2 * batch, tokens, kept + 1, **where)
    x, teacher = draw(batch, tokens, dim, **where), draw(batch, tokens, dim, grad=False, **where)
    rows, some = draw(batch, kept, dim, **where), draw(kept + 2, dim, **where)
    token, table = draw(dim, **where), draw(tokens, dim, **where)

    def assembled(context, token, table, kept, wanted):
        made = assemble_tokens(context, kept, token, wanted, positions=table, backend=name)
        return made.targets(made.tokens * 2.0, backend=name)

    def assembled_packed(context, token, index, offsets):
        made = assemble_tokens(
            context, index, token, index,
            context_offsets=offsets, target_offsets=offsets, backend=name,
        )  # fmt: skip
        return made.tokens

    return {
        "gather": (lambda x, i: gather_tokens(x, i, backend=name), (x,), (dense.index,)),
        "gather packed": (
            lambda x, i, o: gather_tokens(x, i, offsets=o, backend=name),
            (x,),
            (packed.index, packed.offsets),
        ),
        "scatter": (
            lambda z, i: scatter_tokens(z, i, 9, fill=2.0, backend=name),
            (rows,),
            (dense.index,),
        ),
        "loss": (
            lambda p, t, i: prediction_loss(p, t, i, backend=name) * 2.0,
            (rows, teacher),
            (dense.index,),
        ),
        "loss packed": (
            lambda p, t, i, o: prediction_loss(p, t, i, offsets=o, kind="l1", backend=name),
            (some, teacher),
            (packed.index, packed.offsets),
        ),
        "loss of a list": (
            lambda p, q, t, i, j: prediction_loss(
                [p, q], t, [i, j], kind="cosine", reduction="tokens", backend=name
            ),
            (rows, draw(batch, kept + 1, dim, **where), teacher),
            (dense.index, rest.index[:batch]),
        ),
        "assembly": (assembled, (rows, token, table), (dense.index, rest.index)),
        "assembly packed": (
            assembled_packed,
            (some, draw(dim, **where)),
            (packed.index, packed.offsets),
        ),
    }


NAMES = (
    "gather", "gather packed", "scatter", "loss", "loss packed", "loss of a list", "assembly",
    "assembly packed",
)  # fmt: skip


def outcome(function, leaves, integers):
    return run(lambda *z: function(*z, *integers), *leaves)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(fused, name):
    """Every op with the arguments that a public call gives it, forward and backward."""
    function, leaves, integers = cases(fused)[name]
    with RecordedOps() as ops:
        outcome(function, leaves, integers)
    seen = [(op, args) for op, args in ops.calls if fused.name in words(args)]
    assert seen
    for op, args in seen:
        detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(getattr(torch.ops.vicreg_kernels, op).default, detached)


@pytest.mark.parametrize("name", NAMES)
def test_fullgraph_equals_eager(fused, name):
    function, leaves, integers = cases(fused)[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = outcome(function, leaves, integers)
    for mine, theirs in zip(outcome(compiled, leaves, integers), expected, strict=True):
        same(mine, theirs, name)


@pytest.mark.parametrize("name", ["gather", "loss", "assembly"])
def test_fullgraph_of_the_reference(fused, name):
    function, leaves, integers = cases(type(fused)("reference", fused.device))[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = outcome(function, leaves, integers)
    for mine, theirs in zip(outcome(compiled, leaves, integers), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.thorough
def test_inductor(fused):
    """The default compiler, with arithmetic around the ops that it generates code for."""
    function, leaves, integers = cases(fused)["loss"]

    def around(p, t, i):
        return function(2.0 * p, t - 1.0, i)

    with inductor.anew():
        actual = outcome(torch.compile(around, fullgraph=True), leaves, integers)
    torch.testing.assert_close(actual, outcome(around, leaves, integers))


@pytest.mark.triton_takes(lambda name, **_: name in ("gather", "loss packed", "assembly"))
@pytest.mark.parametrize("name", ["gather", "loss", "loss of a list", "assembly", "scatter"])
def test_dynamic_shapes_compile_once(fused, name):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = None
    counts = []
    for batch, kept, dim in [(2, 4, 6), (3, 5, 8), (4, 3, 16), (5, 7, 33)]:
        function, leaves, integers = _resized(fused, name, batch, kept, dim)
        if compiled is None:
            compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
        expected = outcome(function, leaves, integers)
        for mine, theirs in zip(outcome(compiled, leaves, integers), expected, strict=True):
            same(mine, theirs, name)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0], counts


_FUNCTIONS = {}


def _resized(fused, name, batch, kept, dim):
    where = {"device": fused.device}
    dense = mask(batch, 9, kept, **where).index
    rows, teacher = draw(batch, kept, dim, **where), draw(batch, 9, dim, grad=False, **where)
    fresh = cases(fused)
    function = _FUNCTIONS.setdefault((fused.name, name), fresh[name][0])
    if name == "gather":
        return function, (draw(batch, 9, dim, **where),), (dense,)
    if name == "scatter":
        return function, (rows,), (dense,)
    if name == "loss":
        return function, (rows, teacher), (dense,)
    if name == "loss of a list":
        other = mask(batch, 9, kept + 1, **where).index
        return function, (rows, draw(batch, kept + 1, dim, **where), teacher), (dense, other)
    wanted = mask(batch, 9, kept + 1, **where).index
    return function, (rows, draw(dim, **where), draw(9, dim, **where)), (dense, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_lower(fused, name):
    """Same bits with and without, forward and backward inside the region."""
    function, leaves, integers = cases(fused)[name]
    plain = outcome(function, leaves, integers)
    with torch.autocast(fused.device, dtype=torch.bfloat16):
        cast = outcome(function, leaves, integers)
    for mine, theirs in zip(cast, plain, strict=True):
        same(mine, theirs, name)


@pytest.mark.triton_takes(lambda **_: False)  # its dtypes: test_loss_at_real_shapes
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_predictions_of_a_float_teacher(fused, kind, half):
    """What autocast makes: the predictor ends in a linear layer, the teacher in a layer norm."""
    pred = draw(2, 4, 6, dtype=half, device=fused.device)
    teacher = draw(2, 9, 6, grad=False, device=fused.device)
    index = mask(2, 9, 4, device=fused.device).index
    loss = prediction_loss(pred, teacher, index, kind=kind, backend=fused.name)
    (grad,) = torch.autograd.grad(loss, pred)
    assert loss.dtype == torch.float32
    assert grad.dtype == half


@pytest.mark.parametrize("name", ["loss", "assembly"])
def test_second_derivative_is_a_clear_error(fused, name):
    function, leaves, integers = cases(fused)[name]
    value = function(*leaves, *integers).square().sum()
    (grad,) = torch.autograd.grad(value, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|differentiates once"):
        (grad.square().sum() + leaves[0].square().sum()).backward()


@pytest.mark.parametrize("name", ["gather", "scatter"])
def test_rows_differentiate_to_any_order(fused, name):
    function, (leaf,), integers = cases(fused)[name]
    reference = cases(type(fused)("reference", fused.device))[name][0]

    def third(function):
        value = function(leaf, *integers).pow(4).sum()
        for _ in range(2):
            (value,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = value.pow(2).sum()
        return torch.autograd.grad(value, leaf)[0]

    torch.testing.assert_close(third(function), third(reference))


def test_backward_twice(fused):
    function, leaves, integers = cases(fused)["loss"]
    loss = function(*leaves, *integers)
    first = torch.autograd.grad(loss, leaves[0], retain_graph=True)
    same(torch.autograd.grad(loss, leaves[0])[0], first[0], "second backward")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_module_copies_and_pickles(fused, duplicate):
    _, (pred, teacher), (index,) = cases(fused)["loss"]
    module = PredictionLoss("smooth_l1", beta=0.5, eps=1e-6, backend=fused.name)
    same(duplicate(module)(pred, teacher, index), module(pred, teacher, index), "copy")
    assert not module.state_dict()
    assert "0.5" in repr(module)


# What a dispatch mode sees of each case's forward and backward.
ASSEMBLED = ["order", "assemble", "gather", "scatter", "gather", "column_sum", "scatter"]
OPS = {
    "gather": ["gather", "scatter"],
    "gather packed": ["gather", "scatter"],
    "scatter": ["scatter", "gather"],
    "loss": ["loss_forward", "loss_backward"],
    "loss packed": ["loss_forward", "loss_backward"],
    "loss of a list": ["loss_forward", "loss_forward", "loss_backward", "loss_backward"],
    "assembly": ASSEMBLED,
    "assembly packed": ["order", "assemble", "gather", "column_sum"],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_dispatch_mode_sees_every_op(fused, name):
    """Outside of modes the ops' implementations are called directly; the outcome is the same."""
    function, leaves, integers = cases(fused)[name]
    with RecordedOps() as ops:
        dispatched = outcome(function, leaves, integers)
    seen = [op.removeprefix("tokens_") for op, args in ops.calls if fused.name in words(args)]
    assert seen == OPS[name]
    with torch.autograd.profiler.profile() as profile:
        direct = outcome(function, leaves, integers)
    assert not [e.name for e in profile.function_events if e.name.startswith("vicreg_kernels::")]
    for mine, theirs in zip(direct, dispatched, strict=True):
        same(mine, theirs, name)


@pytest.mark.parametrize("name", ["gather", "scatter", "loss", "assembly"])
def test_fake_tensors(fused, name):
    function, leaves, integers = cases(fused)[name]
    expected = outcome(function, leaves, integers)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(z) for z in (*leaves, *integers)]
        made = outcome(function, fakes[: len(leaves)], fakes[len(leaves) :])
    for mine, theirs in zip(made, expected, strict=True):
        assert mine.fake_mode is mode
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("name", ["gather", "scatter", "loss", "assembly"])
def test_pending_negation(fused, name):
    """In an input and in the incoming gradient."""
    function, (leaf, *others), integers = cases(fused)[name]
    value = function(-leaf, *others, *integers)
    grad = torch.randn_like(value)
    expected = (value, *torch.autograd.grad(value, leaf, -grad))
    value = function(torch._neg_view(leaf), *others, *integers)
    actual = (value, *torch.autograd.grad(value, leaf, torch._neg_view(grad)))
    for mine, theirs in zip(actual, expected, strict=True):
        same(mine, theirs, name)


def test_batched_gradients(fused):
    """autograd's vmap over incoming gradients, one op call each."""
    function, (leaf,), integers = cases(fused)["gather"]
    value = function(leaf, *integers)
    grads = torch.randn(3, *value.shape, device=fused.device)
    (batched,) = torch.autograd.grad(value, leaf, grads, is_grads_batched=True, retain_graph=True)
    for mine, grad in zip(batched, grads, strict=True):
        same(mine, torch.autograd.grad(value, leaf, grad, retain_graph=True)[0], "batched")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_kept_between_calls(fused, name):
    function, leaves, integers = cases(fused)[name]
    outcome(function, leaves, integers)
    alive = [weakref.ref(z) for z in (*leaves, *integers)]
    del function, leaves, integers
    assert not [z for z in alive if z() is not None]
