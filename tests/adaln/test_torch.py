"""Tier 6: adaptive layer norm under torch: opcheck, fullgraph compile, dynamic shapes, autocast."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from tests.adaln.cases import FORMS, MIXES, draw, run, same, vectors
from tests.helpers.recorded_ops import RecordedOps, words
from vicreg_kernels.adaln import AdaLN, gated_residual, modulated_layer_norm


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block(backend):
    """Both ops, as a branch of a block uses them."""

    def function(x, shift, scale, gate):
        normed = modulated_layer_norm(x, shift, scale, backend=backend)
        return gated_residual(x, normed, gate, backend=backend)

    return function


def leaves(fused, shape=(2, 3, 5, 8), form="frame", mix=MIXES[0]):
    x = draw(*shape, dtype=mix[0], device=fused.device)
    return x, *vectors(3, shape, form, dtype=mix[2], device=fused.device)


@pytest.mark.triton_takes(lambda form, **_: form == "frame")
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(fused, form):
    """Every op with the arguments that a public call gives it, forward and backward."""
    given = leaves(fused, form=form)
    with RecordedOps() as ops:
        run(block(fused.name), *given)
    seen = {op: args for op, args in ops.calls if fused.name in words(args)}
    assert sorted(seen) == [
        "adaln_gate_backward", "adaln_gate_forward", "adaln_norm_backward", "adaln_norm_forward",
    ]  # fmt: skip
    for op, args in seen.items():
        detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(getattr(torch.ops.vicreg_kernels, op).default, detached)


@pytest.mark.triton_takes(lambda form, **_: form == "frame")
@pytest.mark.parametrize("form", ["frame", "token"])
def test_fullgraph_equals_eager(fused, form):
    given = leaves(fused, form=form, mix=MIXES[3])
    compiled = torch.compile(block(fused.name), fullgraph=True, backend="aot_eager")
    same(run(compiled, *given), run(block(fused.name), *given))


@pytest.mark.triton_takes(lambda **_: False)
def test_dynamic_shapes_compile_once(fused):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block(fused.name), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for shape in ((2, 3, 5, 8), (3, 2, 7, 9), (4, 5, 6, 16)):
        given = leaves(fused, shape)
        same(run(compiled, *given), run(block(fused.name), *given))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], counts


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_here(fused, half):
    """What is around is lowered: a condition's vectors come in half beside x in float32."""
    given = leaves(fused)
    expected = run(block(fused.name), *given)
    with torch.autocast(fused.device, dtype=half):
        same(run(block(fused.name), *given), expected)
        same(run(block("reference"), *given), run(block("reference"), *given))
        vector = F.linear(given[1], torch.eye(8, device=fused.device))
        assert vector.dtype == half
        assert modulated_layer_norm(given[0], vector, vector).dtype == torch.float32


def test_second_derivative_is_an_error(fused):
    x, shift, scale, gate = leaves(fused)
    for function, wanted, name in (
        (modulated_layer_norm, (x, shift, scale), "modulated layer norm"),
        (gated_residual, (x, x * 2.0, gate), "gated residual"),
    ):
        value = function(*wanted, backend=fused.name)
        grads = torch.autograd.grad(value.square().sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match=f"the fused {name} differentiates once"):
            torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)


def test_no_gradient_wanted(fused):
    x, shift, scale, gate = leaves(fused)
    with torch.no_grad():
        assert not block(fused.name)(x, shift, scale, gate).requires_grad
    out = modulated_layer_norm(x.detach(), shift.detach(), scale, backend=fused.name)
    (grad,) = torch.autograd.grad(out.sum(), scale)
    assert grad.isfinite().all()


def test_the_gradient_of_the_residual_stream_is_the_incoming_one(fused):
    """As it is, without a copy."""
    x, _, _, gate = leaves(fused, (2, 5, 8))
    incoming = torch.randn_like(x)
    out = gated_residual(x, x.detach() * 2.0, gate, backend=fused.name)
    (gradient,) = torch.autograd.grad(out, x, incoming)
    assert gradient.data_ptr() == incoming.data_ptr()


def test_the_module_is_copied_pickled_and_compiled(fused):
    module = AdaLN(8, 4, backend=fused.name)
    torch.nn.init.normal_(module.linear.weight)
    twins = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)))
    module = module.to(fused.device)
    x, condition = draw(2, 3, 8, device=fused.device), draw(2, 4, device=fused.device)

    def call(layer):
        return layer(x, condition, torch.sin, torch.cos)

    expected = call(module)
    for twin in twins:
        assert torch.equal(call(twin.to(fused.device)), expected)
    assert torch.equal(call(torch.compile(module, fullgraph=True, backend="eager")), expected)
    with pytest.raises(ValueError, match=r"^eps: got -1"):
        AdaLN(8, eps=-1.0)
