"""Tier 6: what torch expects of SIGReg: opcheck, fullgraph compile, dynamic shapes, autocast."""

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
from vicreg_kernels.sigreg import LeJEPALoss, SIGRegLoss, sigreg_directions, sigreg_loss

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def embeddings(shape, fused, dtype=torch.float32):
    return shapes.randn(*shape, dtype=dtype, device=fused.device).requires_grad_()


def assert_same_outcome(actual, expected):
    """To the last bit: compiling moves the same op calls."""
    pairs = zip(actual.values + actual.gradients, expected.values + expected.gradients, strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(fused, dtype):
    for shape in [(6, 9), (3, 9, 4)]:
        with RecordedOps() as ops:
            z = embeddings(shape, fused, dtype)
            sigreg_loss(z, slices=20, step=5, backend=fused.name).backward()
        names = [name for name, _ in ops.calls if name.count("_") == 1]
        assert names == ["sigreg_directions", "sigreg_forward", "sigreg_backward"]
        for name, args in ops.calls:
            if name in names:
                plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
                torch.library.opcheck(getattr(torch.ops.vicreg_kernels, name).default, plain)


def functions(backend):
    """Every public entry as a function of z [3, N, D]."""
    given = {"slices": 20, "backend": backend}
    return {
        "lejepa": lambda z: sigreg_loss(z, step=3, **given),
        "eb_jepa": lambda z: sigreg_loss(z[0], convention="eb_jepa", seed=4, **given),
        "pooled": lambda z: sigreg_loss(z, convention="stable_pretraining", **given),
        "unequal": lambda z: sigreg_loss(z, knots=(0.0, 0.5, 0.6, 2.0), **given),
        "directions": lambda z: sigreg_loss(
            z, directions=sigreg_directions(7, 9, device=z.device, backend=backend), backend=backend
        ),
        "LeJEPALoss": lambda z: LeJEPALoss(**given)(z, 2),
    }


@pytest.mark.parametrize("name", functions(None))
def test_fullgraph_equals_eager(fused, name):
    function = functions(fused.name)[name]
    z = embeddings((3, 6, 7), fused)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_outcome(differentiate(compiled, z), differentiate(function, z))


def test_fullgraph_of_the_reference(fused):
    z = embeddings((3, 6, 7), fused)
    function = functions("reference")["lejepa"]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_outcome(differentiate(compiled, z), differentiate(function, z))


@pytest.mark.thorough
def test_inductor(fused):
    """The default compiler, with arithmetic around the op that it generates code for."""

    def function(z, step):
        return sigreg_loss(2.0 * z, slices=20, step=step, backend=fused.name)

    z = embeddings((12, 20), fused)
    step = torch.tensor(2, device=fused.device)
    with inductor.anew():
        actual = differentiate(lambda z: torch.compile(function, fullgraph=True)(z, step), z)
    expected = differentiate(lambda z: function(z, step), z)
    torch.testing.assert_close(actual.values, expected.values)
    torch.testing.assert_close(actual.gradients, expected.gradients)


@pytest.mark.parametrize("kind", ["int", "tensor"])
def test_a_step_that_moves_on(fused, kind):
    """Fresh directions in every step; the graph of an int step is compiled once more, when it is
    first seen to change.
    """

    def function(z, step):
        return sigreg_loss(z, slices=20, step=step, backend=fused.name)

    z = embeddings((6, 7), fused)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    values = set()
    for number in (0, 1, 7, 8, 9, 2**40):
        step = number if kind == "int" else torch.tensor(number, device=fused.device)
        outcome = differentiate(lambda z, step=step: compiled(z, step), z)
        assert_same_outcome(outcome, differentiate(lambda z, step=step: function(z, step), z))
        values.add(outcome.values[0].item())
    assert len(values) == 6
    assert counter.frame_count <= (3 if kind == "int" else 1)


def test_a_compiled_module_counts(fused):
    z = embeddings((6, 7), fused)
    plain = SIGRegLoss(20, seed=1, backend=fused.name)
    twin = copy.deepcopy(plain)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin.to(fused.device), fullgraph=True, backend=counter)
    for _ in range(3):
        assert_same_outcome(differentiate(compiled, z), differentiate(plain, z))
    assert plain.step == twin.step == 3
    assert counter.frame_count == 1


def test_dynamic_shapes_compile_once(fused):
    counter = CompileCounterWithBackend("aot_eager")

    def function(z):
        return sigreg_loss(z, slices=20, backend=fused.name)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for shape in [(16, 40), (8, 30), (20, 21), (5, 6), (17, 129), (129, 3)]:
        z = embeddings(shape, fused)
        assert_same_outcome(differentiate(compiled, z), differentiate(function, z))
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0], compilations


@pytest.mark.parametrize("half", HALVES)
def test_autocast_does_not_lower(fused, half):
    """Same bits with and without, forward and backward inside the region, compiled too; and so for
    the reference's forward.
    """

    def function(z):
        return sigreg_loss(z, slices=20, backend=fused.name)

    def inside(z, backend=fused.name):
        with torch.autocast(fused.device, dtype=half):
            return sigreg_loss(z, slices=20, backend=backend)

    z = embeddings((33, 70), fused)
    plain = differentiate(function, z)
    with torch.autocast(fused.device, dtype=half):
        assert_same_outcome(differentiate(function, z), plain)
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    assert_same_outcome(differentiate(compiled, z), plain)
    assert torch.equal(inside(z, "reference"), sigreg_loss(z, slices=20, backend="reference"))


@pytest.mark.parametrize("half", HALVES)
def test_half_inputs(fused, half):
    """A float32 loss, and the gradient in the input's dtype; compiled too."""

    def function(z):
        return sigreg_loss(z, slices=20, backend=fused.name)

    z = embeddings((9, 14), fused, half)
    expected = differentiate(function, z)
    assert expected.values[0].dtype == torch.float32
    assert expected.gradients[0].dtype == half
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_outcome(differentiate(compiled, z), expected)


def test_second_derivative_is_a_clear_error(fused):
    """A gradient penalty must not lose its share in silence."""
    z = embeddings((6, 9), fused)
    for loss in (
        sigreg_loss(z, slices=20, backend=fused.name),
        sigreg_loss(z, slices=20, backend=fused.name) * z.sum(),
    ):
        (grad,) = torch.autograd.grad(loss, z, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiates once"):
            torch.autograd.grad(grad.square().sum() + z.square().sum(), z)


def test_backward_twice_and_checkpoint(fused):
    """The saved tensors outlive the first backward; a changed input is caught."""

    def function(z):
        return sigreg_loss(z, slices=20, step=2, backend=fused.name)

    z = embeddings((6, 9), fused)
    hidden = z * 1.0
    loss = function(hidden)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(loss, z, retain_graph=True)
    assert torch.equal(first, second)
    recomputed = differentiate(lambda z: checkpoint(function, z, use_reentrant=False), z)
    assert_same_outcome(recomputed, differentiate(function, z))
    hidden.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_modules_copy_and_pickle(fused, duplicate):
    z = embeddings((3, 6, 9), fused)
    for module in (
        SIGRegLoss(20, convention="eb_jepa", seed=3, backend=fused.name),
        LeJEPALoss(0.1, weighting="sum", slices=20, t_max=2.5, backend=fused.name),
    ):
        module(z)
        twin = duplicate(module)
        assert torch.equal(twin(z), module(z))
        assert [v.item() for v in twin.state_dict().values()] == [2]
        assert "eb_jepa" in repr(module) or "weighting='sum'" in repr(module)
