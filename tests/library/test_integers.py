"""Lengths, offsets, sizes and places are checked before they are narrowed to int32."""

from __future__ import annotations

import pytest
import torch

import vicreg_kernels as vk
from vicreg_kernels.core import integers, library

WRAP = 2**32
X = torch.randn(2, 5, 3)


def packed(offsets, **settings):
    x = torch.randn(6, 1, 16)
    return vk.masked_attention(x, x, x, mask=vk.Ragged(offsets, **settings))


def assembled(context_index, target_index, positions=None, **settings):
    return vk.assemble_tokens(
        torch.randn(1, 2, 4),
        context_index,
        torch.randn(4),
        target_index,
        positions=positions,
        **settings,
    )


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def turned(index=None, grid=(2, 3), **settings):
    return vk.Rope3d(grid, index, **settings)


BACKENDS = ["reference", *(["cpu"] if library.CPU_MISSING is None else [])]
WRAPPED = {
    "lengths": lambda: vk.KeyPadding([WRAP + 3, 6]),
    "lengths, negative": lambda: vk.KeyPadding([-WRAP + 3, 6]),
    "lengths, tensor": lambda: vk.KeyPadding(torch.tensor([WRAP + 3, 6])),
    "lengths, many": lambda: vk.KeyPadding(torch.full((500,), WRAP + 3)),
    "lengths, beyond int64": lambda: vk.KeyPadding([2**70]),
    "offsets": lambda: packed([0, WRAP + 3, WRAP + 6]),
    "offsets, between": lambda: packed([0, WRAP + 3, 6]),
    "offsets, first": lambda: packed(torch.tensor([WRAP, 3, 2 * WRAP + 6])),
    "offsets, many": lambda: packed(torch.arange(500) * WRAP),
    "key_offsets": lambda: vk.Ragged([0, 3, 6], [0, 3, WRAP + 6]),
    "sizes": lambda: vk.Blocks(2, [WRAP + 1]),
    "sizes, together": lambda: vk.Blocks(2**31 - 1, [2**31 - 1]),
    "context": lambda: vk.Blocks(WRAP + 2, [1]),
    "context, tensor": lambda: vk.Blocks(torch.tensor([WRAP + 2]), [1]),
    "grid": lambda: turned(grid=(2**16, 2**16)),
    "index, rope": lambda: turned(torch.tensor([WRAP + 1])),
    "key_index, rope": lambda: turned(key_index=torch.tensor([WRAP + 1])),
    "offsets, rope": lambda: vk.apply_rope(
        torch.randn(6, 1, 16), turned(), offsets=torch.tensor([0, WRAP + 3, 6])
    ),
    "index, gather": lambda: vk.gather_tokens(X, torch.tensor([[0], [WRAP + 1]])),
    "offsets, gather": lambda: vk.gather_tokens(X, torch.tensor([0, 1]), offsets=[0, 1, WRAP + 2]),
    "index, scatter": lambda: vk.scatter_tokens(X[:, :1], torch.tensor([[0], [WRAP + 1]]), 5),
    "index, prediction": lambda: vk.prediction_loss(X[:, :1], X, torch.tensor([[0], [WRAP + 1]])),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_what_int32_cannot_hold_is_named(case):
    name = case.split(",")[0]
    with pytest.raises(ValueError, match=f"^{name}: got "):
        WRAPPED[case]()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", [None, torch.randn(5, 4)])
@pytest.mark.parametrize("narrow", ["context_index", "target_index"])
def test_indices_of_two_widths(backend, positions, narrow):
    """An int64 index beside an int32 one is checked as int64, and used as it is."""
    small, large = int32(0, 3)[None], torch.tensor([[WRAP + 1, WRAP + 2]])
    pair = (small, large) if narrow == "context_index" else (large, small)
    other = "target_index" if narrow == "context_index" else "context_index"
    with pytest.raises((ValueError, RuntimeError), match=rf"{other}: got 429496729[78]\b"):
        assembled(*pair, positions, backend=backend)
    right = (small, (large - WRAP)) if narrow == "context_index" else (large - WRAP, small)
    made = assembled(*right, positions, backend=backend)
    assert made.index.tolist() == [[0, 1, 2, 3]]


FLOATS = {
    "lengths": lambda z: vk.KeyPadding(z),
    "offsets": lambda z: vk.Ragged(z),
    "key_offsets": lambda z: vk.Ragged([0, 2, 3], z),
    "sizes": lambda z: vk.Blocks(2, z),
    "context": lambda z: vk.Blocks(torch.as_tensor(z), [1]),
    "offsets, gather": lambda z: vk.gather_tokens(X, int32(0, 1, 2), offsets=z),
    "offsets, scatter": lambda z: vk.scatter_tokens(X[0, :3], int32(0, 1, 2), 5, offsets=z),
    "offsets, prediction": lambda z: vk.prediction_loss(X[0, :3], X, int32(0, 1, 2), offsets=z),
    "context_offsets": lambda z: vk.assemble_tokens(
        X[0, :3], int32(0, 1, 2), X[0, 0], int32(0, 1, 2), context_offsets=z, target_offsets=[0, 3]
    ),
    "target_offsets": lambda z: vk.assemble_tokens(
        X[0, :3],
        int32(0, 1, 2),
        X[0, 0],
        int32(0, 1, 2),
        context_offsets=[0, 1, 3],
        target_offsets=z,
    ),
    "offsets, rope": lambda z: vk.apply_rope(torch.randn(3, 1, 16), turned(), offsets=z),
}


@pytest.mark.parametrize("case", FLOATS)
@pytest.mark.parametrize(
    "values", [[0, 1.7, 3], torch.tensor([0.0, 1.0, 3.0]), [True, False, True]], ids=str
)
def test_what_is_no_integer_is_a_type_error(case, values):
    with pytest.raises(TypeError, match=f"^{case.split(',')[0]}: got "):
        FLOATS[case](values)


@pytest.mark.parametrize("values", [None, "012", [0, None], [0, "1"], [[0], [1, 2]], {0: 1}])
def test_what_makes_no_tensor_is_named(values):
    with pytest.raises((TypeError, ValueError), match=r"^offsets: got "):
        vk.Ragged(values)


def test_a_device_s_values_are_held_at_the_end_of_int32(monkeypatch):
    """They are not looked at there; cut, 2^32 + 3 would be a valid 3."""
    monkeypatch.setattr(integers, "readable", lambda z: False)
    wide = torch.tensor([WRAP + 3, -WRAP - 3, 7])
    assert integers.narrowed("x", wide).tolist() == [2**31 - 1, -(2**31), 7]


def test_a_rule_on_the_cpu_holds_its_own_copy():
    """What was checked once cannot change behind the check."""
    offsets = int32(0, 2, 6)
    rule = vk.Ragged(offsets)
    x = torch.randn(6, 1, 16)
    before = vk.masked_attention(x, x, x, mask=rule)
    offsets.copy_(int32(0, 6, 6))
    assert torch.equal(before, vk.masked_attention(x, x, x, mask=rule))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_and_windows_past_int32(backend):
    """They reach past every token, as 10^6 does; cut, 2^32 + 2 would be 2."""
    x = torch.randn(1, 1, 12, 16)

    def attend(*frames):
        return vk.masked_attention(x, x, x, mask=vk.FrameCausal(*frames), backend=backend)

    assert torch.equal(attend(WRAP + 2), attend(10**6))
    assert torch.equal(attend(2, WRAP + 2), attend(2))
    assert torch.equal(attend(WRAP + 2, WRAP + 1), attend(10**6))
