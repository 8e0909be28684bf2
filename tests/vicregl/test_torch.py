"""Tier 6: VICRegL under torch: opcheck, fullgraph compile, dynamic shapes, autocast, pickles."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers.recorded_ops import RecordedOps, words
from tests.vicregl.cases import MATCHES, VIEWS, draw, outcome
from vicreg_kernels.vicregl import VICRegLLoss, VICRegLTerms, vicregl_loss, vicregl_terms


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def equal(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def gradients(function, inputs):
    embeddings, maps, _ = inputs
    value = function(*inputs)
    return value.detach(), *torch.autograd.grad(value, [*embeddings, *maps])


def loss(backend, **settings):
    return lambda e, m, g: vicregl_loss(e, m, g, backend=backend, **MATCHES, **settings)


def test_opcheck(fused):
    """Each op with the arguments that a public call gives it, forward and backward."""
    with RecordedOps() as ops:
        outcome(draw(VIEWS["small"], device=fused.device), fused.name)
    seen = {n: a for n, a in ops.calls if n.startswith("vicregl") and fused.name in words(a)}
    assert sorted(seen) == ["vicregl_match", "vicregl_pairs_backward", "vicregl_pairs_forward"]
    for name, args in seen.items():
        detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(getattr(torch.ops.vicreg_kernels, name).default, detached)


def test_fullgraph_equals_eager(fused):
    """Views of three sizes, so that every op is called in every way; the terms keep their names."""
    inputs = draw(VIEWS["small"], device=fused.device)

    def function(*inputs):
        return vicregl_terms(*inputs, backend=fused.name, **MATCHES)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    terms = compiled(*inputs)
    assert isinstance(terms, VICRegLTerms)
    equal(terms, function(*inputs))
    leaves = [*inputs[0], *inputs[1]]
    equal(*(torch.autograd.grad(t.loss, leaves) for t in (terms, function(*inputs))))


@pytest.mark.thorough
def test_dynamic_shapes_compile_once(fused):
    counter = CompileCounterWithBackend("aot_eager")
    function = loss(fused.name)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch, channels, dim, shape in [
        (6, 10, 12, (3, 4)),
        (5, 9, 11, (4, 5)),
        (4, 20, 8, (3, 3)),
    ]:
        inputs = draw((shape, shape), batch, channels, dim, device=fused.device)
        equal(gradients(compiled, inputs), gradients(function, inputs))
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0], compilations


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lower(fused, half):
    inputs = draw(VIEWS["small"], device=fused.device)
    plain = outcome(inputs, fused.name)
    with torch.autocast(fused.device, dtype=half):
        cast = outcome(inputs, fused.name)
        reference = outcome(inputs, "reference").values
    equal((*cast.values, *cast.gradients), (*plain.values, *plain.gradients))
    equal(reference, outcome(inputs, "reference").values)


def test_second_derivative_is_an_error(fused):
    inputs = draw(VIEWS["two"], device=fused.device)
    for settings in ({"alpha": 0.0, "variance_weight": 0.0}, {}):
        value = vicregl_loss(*inputs, backend=fused.name, **MATCHES, **settings)
        grads = torch.autograd.grad(value, inputs[1], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiates once"):
            torch.autograd.grad(sum(g.sum() for g in grads), inputs[1])


def test_no_gradient_wanted(fused):
    inputs = draw(VIEWS["two"], device=fused.device)
    with torch.no_grad():
        assert not vicregl_loss(*inputs, backend=fused.name, **MATCHES).requires_grad
    embeddings, maps, grids = inputs
    maps = [maps[0], maps[1].detach()]
    value = vicregl_loss(embeddings, maps, grids, backend=fused.name, **MATCHES)
    (alone,) = torch.autograd.grad(value, maps[:1])
    both = outcome(inputs, fused.name)
    assert alone.shape == both.gradients[2].shape


def test_the_module_is_copied_and_pickled(fused):
    module = VICRegLLoss(0.5, (4, 2), fast_vc_reg=True, backend=fused.name)
    inputs = draw(VIEWS["two"], device=fused.device)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*inputs), module(*inputs))
    assert "alpha=0.5" in repr(module)
    assert not list(module.parameters())
