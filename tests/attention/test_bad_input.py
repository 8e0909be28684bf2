"""What the attention op refuses: an error that names the argument, on every backend, before any
kernel runs.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.recorded_ops import RecordedOps
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
from vicreg_kernels.core import dispatch

BACKENDS = (None, *dispatch.BACKENDS)


def heads(*shape, **kind):
    return torch.zeros(*shape, **kind)


Q = heads(2, 3, 5, 16)
PACKED = heads(10, 3, 16)
PAD = KeyPadding([1])

# name: (q, k, v), settings, exception, the argument named, words of the message
CASES = {
    "no tensor": ((None, Q, Q), {}, TypeError, "q", ["NoneType", "torch.Tensor"]),
    "integers": ((Q.int(), Q.int(), Q.int()), {}, TypeError, "q", ["torch.int32", "bfloat16"]),
    "two dtypes": ((Q, Q.half(), Q), {}, TypeError, "k", ["torch.float16", "torch.float32"]),
    "two devices": ((Q, Q, Q.to("meta")), {}, ValueError, "v", ["meta", "cpu"]),
    "two dimensions": ((Q[0, 0], Q, Q), {}, ValueError, "q", ["(5, 16)", "[B, H, T, d]"]),
    "sparse": ((Q.to_sparse(), Q, Q), {}, TypeError, "q", ["sparse"]),
    "head dim 8": ((heads(2, 3, 5, 8),) * 3, {}, ValueError, "q", ["head dim 8", "16 to 128"]),
    "head dim 20": ((heads(2, 3, 5, 20),) * 3, {}, ValueError, "q", ["head dim 20", "of 8"]),
    "head dim 136": ((heads(2, 3, 5, 136),) * 3, {}, ValueError, "q", ["head dim 136"]),
    "keys of another head dim": ((Q, heads(2, 3, 5, 24), Q), {}, ValueError, "k", ["24"]),
    "keys of other heads": ((Q, heads(2, 4, 5, 16), Q), {}, ValueError, "k", ["(2, 4, 5, 16)"]),
    "keys of another batch": ((Q, heads(1, 3, 5, 16), Q), {}, ValueError, "k", ["(1, 3, 5, 16)"]),
    "values of another length": ((Q, Q, Q[:, :, :4]), {}, ValueError, "v", ["(2, 3, 4, 16)"]),
    "empty": ((Q[:, :, :0], Q, Q), {}, ValueError, "q", ["no elements"]),
    "packed and dense": ((Q, PACKED, PACKED), {}, ValueError, "k", ["(10, 3, 16)"]),
    "packed without offsets": ((PACKED,) * 3, {}, ValueError, "mask", ["Ragged"]),
    "dense with offsets": ((Q,) * 3, {"mask": Ragged([0, 10])}, ValueError, "q", ["packed"]),
    "offsets short of the tokens": (
        (PACKED,) * 3, {"mask": Ragged([0, 4, 9])}, ValueError, "offsets", ["9", "10"],
    ),
    "offsets past the tokens": (
        (PACKED,) * 3, {"mask": Ragged([0, 11])}, ValueError, "offsets", ["11", "10"],
    ),
    "key offsets short of the keys": (
        (PACKED,) * 3, {"mask": Ragged([0, 10], [0, 9])}, ValueError, "key_offsets", ["9", "10"],
    ),
    "a string for a mask": ((Q,) * 3, {"mask": "causal"}, TypeError, "mask", ["str", "rule"]),
    "a matrix for a mask": (
        (Q,) * 3, {"mask": torch.ones(2, 5, 5, dtype=torch.bool)}, ValueError, "mask", ["[B, Tk]"],
    ),
    "a mask of another length": (
        (Q,) * 3, {"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "mask", ["(2, 4)"],
    ),
    "lengths past the keys": (
        (Q,) * 3, {"mask": KeyPadding([3, 6])}, ValueError, "lengths", ["6", "5"],
    ),
    "lengths of another batch": (
        (Q,) * 3, {"mask": KeyPadding([3])}, ValueError, "lengths", ["1 samples", "2"],
    ),
    "blocks of another batch": (
        (Q,) * 3, {"mask": Blocks([1, 1, 1], [2])}, ValueError, "context", ["3 samples", "2"],
    ),
    "blocks past the tokens": (
        (Q,) * 3, {"mask": Blocks(3, [2, 1])}, ValueError, "sizes", ["token 6", "5"],
    ),
    "blocks with other keys": (
        (Q, Q[:, :, :4], Q[:, :, :4]), {"mask": Blocks(2, [2])}, ValueError, "mask", ["Blocks"],
    ),
    "rope of another kind": ((Q,) * 3, {"rope": "3d"}, TypeError, "rope", ["str", "Rope3d"]),
    "a grid too small": (
        (Q,) * 3, {"rope": Rope3d((2, 2))}, ValueError, "grid", ["(1, 2, 2)", "5"],
    ),
    "an index of another length": (
        (Q,) * 3, {"rope": Rope3d((9,), torch.arange(4))}, ValueError, "index", ["(1, 4)", "T = 5"],
    ),
    "an index of another batch": (
        (Q,) * 3, {"rope": Rope3d((9,), torch.zeros(3, 5).int())}, ValueError, "index", ["(3, 5)"],
    ),
    "a key index of another length": (
        (Q,) * 3, {"rope": Rope3d((9,), None, torch.arange(4))}, ValueError, "key_index", ["4"],
    ),
    "an infinite scale": ((Q,) * 3, {"scale": float("inf")}, ValueError, "scale", ["inf"]),
    "an unknown backend": ((Q,) * 3, {"backend": "gpu"}, ValueError, "backend", ["'gpu'"]),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_refused(case, backend):
    three, settings, exception, argument, words = CASES[case]
    with RecordedOps() as ops, pytest.raises(exception) as caught:
        masked_attention(*three, **{"backend": backend, **settings})
    message = str(caught.value)
    assert message.startswith(f"{argument}: got"), message
    for word in words:
        assert word in message, message
    assert ops.calls == []


# constructor, exception, the argument named, words
RULES = {
    "decreasing": (lambda: Ragged([0, 5, 3, 9]), ValueError, "offsets", ["decrease"]),
    "not from 0": (lambda: Ragged([1, 5]), ValueError, "offsets", ["from 1"]),
    "one offset": (lambda: Ragged([0]), ValueError, "offsets", ["1 offsets", "at least 2"]),
    "float offsets": (lambda: Ragged(torch.tensor([0.0, 3.0])), TypeError, "offsets", ["float32"]),
    "offsets in two dimensions": (
        lambda: Ragged(torch.zeros(2, 2).int()), ValueError, "offsets", ["2 dimensions"],
    ),
    "decreasing keys": (lambda: Ragged([0, 1], [0, -1]), ValueError, "key_offsets", ["decrease"]),
    "another number of key offsets": (
        lambda: Ragged([0, 1], [0, 1, 2]), ValueError, "key_offsets", ["3 offsets", "2"],
    ),
    "a max_length too small": (
        lambda: Ragged([0, 1, 9], max_length=7), ValueError, "max_length", ["7", "8"],
    ),
    "negative lengths": (lambda: KeyPadding([3, -1]), ValueError, "lengths", ["-1"]),
    "float lengths": (lambda: KeyPadding(torch.ones(2)), TypeError, "lengths", ["float32"]),
    "no tokens a frame": (lambda: FrameCausal(0), ValueError, "tokens_per_frame", ["0"]),
    "half a token a frame": (lambda: FrameCausal(0.5), TypeError, "tokens_per_frame", ["float"]),
    "no window": (lambda: FrameCausal(2, window=0), ValueError, "window", ["0"]),
    "a negative block": (lambda: Blocks(3, [2, -1]), ValueError, "sizes", ["-1"]),
    "a negative context": (lambda: Blocks(-3, [2]), ValueError, "context", ["-3"]),
    "blocks of two batches": (
        lambda: Blocks([1, 2], [[1], [2], [3]]), ValueError, "context", ["2 samples", "3"],
    ),
    "two of a kind": (lambda: PAD & PAD, ValueError, "mask", ["KeyPadding"]),
    "padding and offsets": (lambda: PAD & Ragged([0, 1]), ValueError, "mask", ["Ragged"]),
    "a tensor beside &": (lambda: PAD & torch.ones(1), TypeError, "mask", ["Tensor"]),
    "no grid": (lambda: Rope3d(()), ValueError, "grid", ["()"]),
    "four axes": (lambda: Rope3d((1, 2, 3, 4)), ValueError, "grid", ["(1, 2, 3, 4)"]),
    "an empty axis": (lambda: Rope3d((2, 0)), ValueError, "grid", ["(2, 0)"]),
    "an unknown layout": (lambda: Rope3d((2,), layout="hf"), ValueError, "layout", ["axial"]),
    "a negative theta": (lambda: Rope3d((2,), theta=-1.0), ValueError, "theta", ["-1.0"]),
    "a place outside the grid": (
        lambda: Rope3d((2, 3), torch.tensor([0, 6])), ValueError, "index", ["6", "(1, 2, 3)"],
    ),
    "a negative place": (
        lambda: Rope3d((2, 3), torch.tensor([0, -1])), ValueError, "index", ["-1"],
    ),
    "a key's place outside": (
        lambda: Rope3d((4,), None, torch.tensor([4])), ValueError, "key_index", ["4"],
    ),
    "a list of places": (lambda: Rope3d((4,), [0, 1]), TypeError, "index", ["list"]),
    "float places": (lambda: Rope3d((4,), torch.ones(2)), TypeError, "index", ["float32"]),
    "heads that do not divide": (lambda: MaskedAttention(50, 3), ValueError, "num_heads", ["50"]),
    "a module of an unknown backend": (
        lambda: MaskedAttention(48, 3, backend="gpu"), ValueError, "backend", ["'gpu'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_rules_refuse(case):
    make, exception, argument, words = RULES[case]
    with pytest.raises(exception) as caught:
        make()
    message = str(caught.value)
    assert message.startswith(f"{argument}: got"), message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("arguments", "exception", "argument"),
    [
        ((Q, "rope"), TypeError, "rope"),
        ((Q.int(), Rope3d((5,))), TypeError, "x"),
        ((heads(2, 3, 5, 12), Rope3d((5,))), ValueError, "x"),
        ((Q, Rope3d((4,))), ValueError, "grid"),
        ((Q, Rope3d((9,), torch.arange(4))), ValueError, "index"),
    ],
)
def test_rotation_refuses(arguments, exception, argument, backend):
    with RecordedOps() as ops, pytest.raises(exception, match=f"^{argument}: got"):
        apply_rope(*arguments, backend=backend)
    assert ops.calls == []


def test_rotation_refuses_offsets_that_do_not_fit():
    with pytest.raises(ValueError, match=r"^offsets: got"):
        apply_rope(PACKED, Rope3d((10,)), offsets=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match=r"^offsets: got"):
        apply_rope(Q, Rope3d((10,)), offsets=torch.tensor([0, 10]))


def test_nested_tensors_that_do_not_fit():
    jagged = torch.nested.nested_tensor(
        [torch.zeros(n, 3, 16) for n in (2, 4)], layout=torch.jagged
    )
    other = torch.nested.nested_tensor([torch.zeros(n, 3, 16) for n in (3, 3)], layout=torch.jagged)
    flat = torch.nested.nested_tensor([torch.zeros(n, 16) for n in (2, 4)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"^k: got no jagged"):
        masked_attention(jagged, PACKED, PACKED)
    with pytest.raises(ValueError, match=r"^v: got other lengths"):
        masked_attention(jagged, jagged, other)
    with pytest.raises(ValueError, match=r"^q: got 3 dimensions"):
        masked_attention(flat, flat, flat)
    with pytest.raises(ValueError, match=r"^mask: got Ragged with nested"):
        masked_attention(jagged, jagged, jagged, mask=Ragged([0, 2, 6]))


@pytest.mark.parametrize("name", [name for name in dispatch.BACKENDS if name != "reference"])
def test_fused_backends_take_no_float64(name):
    x = Q.double()
    with pytest.raises(RuntimeError, match=rf"backend='{name}'.*(float64|not|no CUDA)"):
        masked_attention(x, x, x, backend=name)


def test_the_cuda_backend_says_what_it_does_not_take(monkeypatch):
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)
    with pytest.raises(RuntimeError, match="tensor-core products take bfloat16 or float16"):
        masked_attention(Q, Q, Q, backend="cuda")
    long = heads(1, 1, 257, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="at most 256 tokens a sample"):
        masked_attention(long, long, long, backend="cuda")


def test_offsets_on_a_device_are_read_in_debug_mode_alone(monkeypatch):
    """A meta tensor stands for the device: it cannot be read."""
    offsets = torch.tensor([0, 4], device="meta")
    assert Ragged(offsets, max_length=4).total is None
    monkeypatch.setattr(dispatch, "DEBUG", True)
    with pytest.raises(ValueError, match=r"^offsets: got a meta tensor"):
        Ragged(offsets, max_length=4)


def test_a_boolean_padding_on_meta_is_called_as_its_caller_calls_it():
    padding = KeyPadding(torch.ones(1, 4, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match=r"^lengths: got a meta tensor"):
        masked_attention(*(torch.randn(1, 1, 4, 16),) * 3, mask=padding)
