"""Tier 6: what torch expects of the attention ops: opcheck, fullgraph compile, dynamic shapes,
autocast, nested tensors.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.helpers import inductor
from tests.helpers.recorded_ops import RecordedOps
from tests.helpers.shapes import randn
from tests.helpers.tolerances import differentiate
from vicreg_kernels import (
    Blocks,
    FrameCausal,
    KeyPadding,
    MaskedAttention,
    Ragged,
    Rope3d,
    apply_rope,
    masked_attention,
)
from vicreg_kernels.attention import rope as rope_module
from vicreg_kernels.core.kept import Kept


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request, fused):
    """The half type alone where a backend takes no float32."""
    if fused.name == "cuda" and request.param == torch.float32:
        pytest.skip("the cuda backend takes half types")
    return request.param


def heads(fused, *shape, dtype=None, count=3):
    dtype = dtype or (torch.bfloat16 if fused.name == "cuda" else torch.float32)
    return [randn(*shape, dtype=dtype, device=fused.device).requires_grad_() for _ in range(count)]


def assert_same_outcome(actual, expected):
    """To the last bit: compiling moves the same op calls."""
    pairs = zip(actual.values + actual.gradients, expected.values + expected.gradients, strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def summed(function):
    """A scalar that weighs every element differently."""

    def loss(*inputs):
        out = function(*inputs)
        return (out * torch.linspace(-1, 2, out.shape[-1], device=out.device)).sum()

    return loss


DENSE, PACKED = (2, 3, 10, 32), (12, 3, 32)
INDEX = torch.tensor([[0, 3, 5, 6, 9, 11, 13, 20, 21, 23], [1, 2, 4, 7, 8, 10, 12, 14, 15, 22]])
# name: (shape, mask, rope)
CASES = {
    "dense": (DENSE, None, None),
    "lengths": (DENSE, KeyPadding([4, 0]), None),
    "keep": (DENSE, torch.tensor([[True, False] * 5, [False] * 9 + [True]]), None),
    "frames": (DENSE, FrameCausal(3, window=2), Rope3d((2, 2, 3))),
    "blocks": (DENSE, Blocks(4, [3, 2]) & KeyPadding([9, 8]), None),
    "ragged": (PACKED, Ragged([0, 5, 5, 12]), None),
    "ragged frames": (
        PACKED,
        Ragged([0, 5, 12]) & FrameCausal(2),
        Rope3d((2, 2, 2), layout="axial"),
    ),
    "places": (DENSE, None, Rope3d((2, 3, 4), INDEX)),
}

# Of them those that Triton compiles; the others' kernels are held in the tests of the values.
FEW_CASES = ("dense", "lengths", "frames", "ragged frames")


def on(mask, fused):
    return mask.to(fused.device) if isinstance(mask, torch.Tensor) else mask


def attend(case, fused):
    shape, mask, rope = CASES[case]
    mask = on(mask, fused)

    def function(q, k, v):
        return masked_attention(q, k, v, mask=mask, rope=rope, backend=fused.name)

    return function, shape


@pytest.mark.triton_takes(lambda case, dtype, **_: dtype == torch.float32 and case in FEW_CASES)
@pytest.mark.parametrize("case", CASES)
def test_opcheck(fused, case, dtype):
    function, shape = attend(case, fused)
    with RecordedOps() as ops:
        summed(function)(*heads(fused, *shape, dtype=dtype)).backward()
    assert [name for name, _ in ops.calls] == ["attention_forward", "attention_backward"]
    for name, args in ops.calls:
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(getattr(torch.ops.vicreg_kernels, name).default, args)


@pytest.mark.parametrize("adjoint", [False, True])
def test_opcheck_of_the_rotation(fused, adjoint, dtype):
    rope = Rope3d((2, 3, 4), INDEX)
    x = heads(fused, *DENSE, dtype=dtype, count=1)[0].detach()
    table, index, _, grid = rope.resolve(x, x, (10, 10))
    args = (x, table, index, None, grid, adjoint, fused.name)
    torch.library.opcheck(torch.ops.vicreg_kernels.attention_rotate.default, args)


@pytest.mark.triton_takes(lambda case, **_: case in FEW_CASES)
@pytest.mark.parametrize("case", CASES)
def test_fullgraph_equals_eager(fused, case):
    function, shape = attend(case, fused)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = heads(fused, *shape)
    assert_same_outcome(
        differentiate(summed(compiled), *inputs), differentiate(summed(function), *inputs)
    )


def test_rules_made_inside_the_graph(fused):
    def function(q, k, v, lengths):
        mask = KeyPadding(lengths) & FrameCausal(2)
        rope = Rope3d((2, 5, 1), layout="axial")
        return masked_attention(q, k, v, mask=mask, rope=rope, backend=fused.name)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs, lengths = heads(fused, *DENSE), torch.tensor([4, 9], device=fused.device)
    assert torch.equal(compiled(*inputs, lengths), function(*inputs, lengths))


def test_ragged_made_inside_the_graph(fused):
    def function(q, k, v, offsets):
        mask = Ragged(offsets, max_length=7)
        return masked_attention(q, k, v, mask=mask, backend=fused.name)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = heads(fused, *PACKED)
    for ends in ([0, 5, 12], [0, 7, 12]):
        offsets = torch.tensor(ends, device=fused.device)
        assert torch.equal(compiled(*inputs, offsets), function(*inputs, offsets))


def test_the_fullgraph_rotation(fused):
    def function(x):
        return apply_rope(x, Rope3d((2, 3, 4)), backend=fused.name)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (x,) = heads(fused, *DENSE, count=1)
    assert_same_outcome(differentiate(summed(compiled), x), differentiate(summed(function), x))


@pytest.mark.thorough
def test_inductor(fused):
    """The default compiler, with the projections around the op that it generates code for."""
    module = MaskedAttention(96, 3, backend=fused.name).to(fused.device)
    x = randn(2, 9, 96, device=fused.device).requires_grad_()
    if fused.name == "cuda":
        module, x = module.bfloat16(), x.detach().bfloat16().requires_grad_()
    rope = Rope3d((3, 3, 1))
    function = summed(lambda x: module(x, mask=FrameCausal(3), rope=rope))
    with inductor.anew():
        actual = differentiate(torch.compile(function, fullgraph=True), x)
    expected = differentiate(function, x)
    torch.testing.assert_close(actual.values, expected.values)
    torch.testing.assert_close(actual.gradients, expected.gradients)


def test_dynamic_shapes_compile_once(fused):
    def function(q, k, v, lengths):
        return masked_attention(q, k, v, mask=KeyPadding(lengths), backend=fused.name)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch, tokens in ((2, 9), (3, 17), (5, 8), (4, 30)):
        inputs = heads(fused, batch, 3, tokens, 32)
        lengths = torch.arange(1, batch + 1, device=fused.device)
        assert_same_outcome(
            differentiate(summed(lambda q, k, v, n=lengths: compiled(q, k, v, n)), *inputs),
            differentiate(summed(lambda q, k, v, n=lengths: function(q, k, v, n)), *inputs),
        )
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0], compilations


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_torch_does(fused, half):
    """float32 inputs under autocast run in the lower type, as scaled_dot_product_attention's do."""
    q, k, v = (randn(2, 3, 9, 32, device=fused.device) for _ in range(3))
    with torch.autocast(fused.device, dtype=half):
        out = masked_attention(q, k.to(half), v, backend=fused.name)
    expected = masked_attention(q.to(half), k.to(half), v.to(half), backend=fused.name)
    assert out.dtype == half
    assert torch.equal(out, expected)


def test_autocast_of_the_reference_computes_in_float32():
    q = torch.randn(2, 3, 9, 16)
    expected = masked_attention(*(q.bfloat16(),) * 3, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(masked_attention(q, q, q, backend="reference"), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_jagged_nested_tensors(fused, transposed):
    """As packed tokens, in the layout they came in, differentiably."""
    parts = [randn(n, 3, 32, device=fused.device) for n in (4, 0, 6)]
    if fused.name == "cuda":
        parts = [part.bfloat16() for part in parts]
    parts = [part.requires_grad_() for part in parts]
    jagged = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    given = jagged.transpose(1, 2) if transposed else jagged
    out = masked_attention(given, given, given, mask=FrameCausal(2), backend=fused.name)
    assert out._ragged_idx == given._ragged_idx
    values = (out.transpose(1, 2) if transposed else out).values()
    packed = torch.cat(parts).detach().requires_grad_()
    mask = Ragged([0, 4, 4, 10]) & FrameCausal(2)
    three = [packed.view_as(packed) for _ in range(3)]  # whose gradients add up in the same order
    expected = masked_attention(*three, mask=mask, backend=fused.name)
    assert torch.equal(values, expected)
    gradients = torch.autograd.grad(values.float().square().sum(), [parts[0], parts[2]])
    (wanted,) = torch.autograd.grad(expected.float().square().sum(), packed)
    assert torch.equal(torch.cat(gradients), wanted)


def test_merging_the_heads_is_a_view(fused):
    """The output lies as [B, T, H, d], whatever the inputs' strides; so do the gradients."""
    q, k, v = heads(fused, *DENSE)
    out = masked_attention(q, k, v, backend=fused.name)
    assert out.transpose(1, 2).is_contiguous()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, True, True)]
)
def test_gradients_of_some(fused, needed):
    inputs = [
        x.detach().requires_grad_(n) for x, n in zip(heads(fused, *DENSE), needed, strict=True)
    ]
    both = [x.detach().requires_grad_() for x in inputs]
    function, _ = attend("frames", fused)
    alone = differentiate(summed(function), *inputs).gradients
    for mine, whole in zip(alone, differentiate(summed(function), *both).gradients, strict=True):
        assert mine is None or torch.equal(mine, whole)
    assert [grad is not None for grad in alone] == list(needed)


@pytest.mark.parametrize("read", ["grad", "backward"])
def test_second_derivative_is_a_clear_error(fused, read):
    q, k, v = heads(fused, *DENSE)
    loss = masked_attention(q, k, v, backend=fused.name).sum() * q.sum()
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    penalised = grad.square().sum() + q.square().sum()
    with pytest.raises(RuntimeError, match=r"differentiate twice|differentiates once"):
        torch.autograd.grad(penalised, q) if read == "grad" else penalised.backward()


def test_the_rotation_differentiates_twice(fused):
    """It is linear: the second derivative of a square is the rotation and back."""
    x = randn(*DENSE, device=fused.device).requires_grad_()
    rope = Rope3d((2, 3, 4))
    out = apply_rope(x, rope, backend=fused.name)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    y = x.detach().double().requires_grad_()
    turned = apply_rope(y, rope, backend="reference")
    (expected,) = torch.autograd.grad(turned.square().sum(), y, create_graph=True)
    (expected,) = torch.autograd.grad(expected.sum(), y)
    torch.testing.assert_close(second.double(), expected, rtol=1e-5, atol=1e-5)


def test_backward_twice(fused):
    inputs = heads(fused, *DENSE)
    out = masked_attention(*inputs, backend=fused.name).sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    second = torch.autograd.grad(out, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_input_changed_before_backward_is_caught(fused):
    q, k, v = heads(fused, *DENSE)
    hidden = q * 1.0
    out = masked_attention(hidden, k, v, backend=fused.name)
    hidden.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_packed_output_may_be_changed_in_place(fused):
    """It is no view to autograd; a change is seen by the backward, which needs the output."""
    inputs = heads(fused, *PACKED)
    mask = Ragged([0, 5, 12])
    out = masked_attention(*inputs, mask=mask, backend=fused.name)
    assert out.is_contiguous()
    out.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_eager_calls_go_straight_to_the_backend(fused, monkeypatch):
    """Past the op, unless somebody looks at ops: then through it, with the same bits."""
    seen = []

    class Spy:
        op = torch.ops.vicreg_kernels.attention_forward

        def __call__(self, *args):
            seen.append(len(args))
            return self.op(*args)

        def __getattr__(self, name):
            return getattr(self.op, name)

    monkeypatch.setattr(torch.ops.vicreg_kernels, "attention_forward", Spy())
    for case in ("frames", "ragged frames"):
        function, shape = attend(case, fused)
        inputs = heads(fused, *shape)
        alone = differentiate(summed(function), *inputs)
        assert not seen
        with RecordedOps():
            assert_same_outcome(differentiate(summed(function), *inputs), alone)
        assert len(seen) == 1
        seen.clear()


def test_a_rules_values_are_checked_at_every_call(fused):
    """Nothing about an earlier call is remembered: the same rule meets other keys."""
    if fused.device != "cpu":
        pytest.skip("values on a device are not read")
    q, k, v = heads(fused, *DENSE)
    mask = KeyPadding(torch.tensor([4, 9], dtype=torch.int32))
    masked_attention(q, k, v, mask=mask, backend=fused.name)
    with pytest.raises(ValueError, match=r"lengths: got 9, takes at most 8"):
        masked_attention(q, k[:, :, :8], v[:, :, :8], mask=mask, backend=fused.name)


def test_tables_of_angles_are_kept_as_ordinary_tensors(fused, monkeypatch):
    """One made under inference_mode serves a training step; one of a fake mode is not kept."""
    monkeypatch.setattr(rope_module, "_TABLES", Kept(entries=9, nbytes=2**20))
    rope = Rope3d((2, 3, 4))
    (q,) = heads(fused, *DENSE, count=1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rope.table(16, q.device)
    assert not rope_module._TABLES.held
    with torch.inference_mode():
        apply_rope(q, rope, backend=fused.name)
    (table,) = rope_module._TABLES.held.values()
    assert not table.is_inference()
    (grad,) = torch.autograd.grad(apply_rope(q, rope, backend=fused.name).sum(), q)
    assert grad.isfinite().all()


def test_checkpoint(fused):
    function, shape = attend("frames", fused)
    inputs = heads(fused, *shape)
    assert_same_outcome(
        differentiate(summed(lambda *x: checkpoint(function, *x, use_reentrant=False)), *inputs),
        differentiate(summed(function), *inputs),
    )


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_module_copies_and_pickles(fused, duplicate):
    module = MaskedAttention(96, 3, qkv_bias=False, backend=fused.name).to(fused.device)
    x = randn(2, 7, 96, device=fused.device)
    if fused.name == "cuda":
        module, x = module.bfloat16(), x.bfloat16()
    assert torch.equal(duplicate(module)(x), module(x))
    assert list(module.state_dict()) == ["qkv.weight", "proj.weight", "proj.bias"]
    assert fused.name in repr(module)


def test_the_log_says_what_ran(caplog):
    q = torch.randn(1, 1, 4, 16)
    with caplog.at_level("DEBUG", logger="vicreg_kernels"):
        masked_attention(q, q, q, backend="reference")
        apply_rope(q, Rope3d((4,)), backend="reference")
    said = [record.getMessage() for record in caplog.records]
    assert "attention (1, 1, 4, 16)" in said[0]
    assert "rope (1, 1, 4, 16)" in said[1]
