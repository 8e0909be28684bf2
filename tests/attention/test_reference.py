"""Tier 1: the attention op's reference: closed forms, gradcheck, and the published conventions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

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

REFERENCE = {"backend": "reference"}
SAME = {"rtol": 1e-12, "atol": 1e-13}


def heads(*shape, count=3):
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def attend(q, k, v, **settings):
    return masked_attention(q, k, v, **settings, **REFERENCE)


# Each rule beside the boolean matrix [B or 1, Tq, Tk] that it stands for, written by hand.
PLACES = torch.arange(10)
FRAMES = PLACES // 3
SEGMENTS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 9])
PADDED = torch.stack([PLACES < 3, PLACES < 10])[:, None]
DENSE = {
    "nothing": (None, torch.ones(1, 10, 10, dtype=torch.bool)),
    "lengths": (KeyPadding([3, 10]), PADDED.expand(2, 10, 10)),
    "keep": (KeyPadding((PLACES % 3 != 1).expand(2, 10)), (PLACES % 3 != 1).expand(2, 10, 10)),
    "tensor": ((PLACES % 2 == 0).expand(2, 10), (PLACES % 2 == 0).expand(2, 10, 10)),
    "causal": (FrameCausal(1), (PLACES[:, None] >= PLACES)[None]),
    "frames": (FrameCausal(3), (FRAMES[:, None] >= FRAMES)[None]),
    "window": (
        FrameCausal(3, window=2),
        ((FRAMES[:, None] >= FRAMES) & (FRAMES[:, None] - FRAMES < 2))[None],
    ),
    "blocks": (
        Blocks(4, [3, 2]),
        ((SEGMENTS == 0) | ((SEGMENTS[:, None] == SEGMENTS) & (SEGMENTS < 9)))[None],
    ),
    "blocks of samples": (
        Blocks([4, 2], [[3, 2], [1, 7]]),
        torch.stack(
            [
                (s == 0) | ((s[:, None] == s) & (s < 9))
                for s in (SEGMENTS, torch.tensor([0, 0, 1, 2, 2, 2, 2, 2, 2, 2]))
            ]
        ),
    ),
    "all": (
        KeyPadding([8, 6]) & FrameCausal(3) & Blocks(4, [3, 2]),
        ((FRAMES[:, None] >= FRAMES) & ((SEGMENTS == 0) | (SEGMENTS[:, None] == SEGMENTS)))
        & torch.stack([PLACES < 8, PLACES < 6])[:, None],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_rules_are_the_masks_they_stand_for(name):
    rule, seen = DENSE[name]
    inputs = heads(2, 3, 10, 16)
    expected = sdpa(*inputs, attn_mask=seen[:, None])
    actual = attend(*inputs, mask=rule)
    torch.testing.assert_close(actual, expected, **SAME)
    weight = torch.randn_like(actual)
    for mine, theirs in zip(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, **SAME)


def test_different_lengths_and_scale():
    q, k, v = (torch.randn(2, 3, n, 16, dtype=torch.float64) for n in (4, 9, 9))
    torch.testing.assert_close(attend(q, k, v, scale=0.3), sdpa(q, k, v, scale=0.3), **SAME)


OFFSETS = [0, 4, 4, 9, 20]


@pytest.mark.parametrize("rule", [None, FrameCausal(2), FrameCausal(2, window=2)])
def test_ragged_is_each_sample_alone(rule):
    q, k, v = heads(20, 3, 16)
    ragged = Ragged(OFFSETS)
    out = attend(q, k, v, mask=ragged if rule is None else ragged & rule)
    for begin, end in itertools.pairwise(OFFSETS):
        if begin == end:
            continue
        alone = attend(*(x[begin:end].transpose(0, 1)[None] for x in (q, k, v)), mask=rule)
        torch.testing.assert_close(out[begin:end], alone[0].transpose(0, 1), **SAME)


def test_ragged_keys_of_their_own():
    q, k, v = (torch.randn(n, 2, 16, dtype=torch.float64) for n in (7, 12, 12))
    out = attend(q, k, v, mask=Ragged([0, 3, 7], [0, 10, 12]))
    first = sdpa(*(x.transpose(0, 1) for x in (q[:3], k[:10], v[:10])))
    torch.testing.assert_close(out[:3], first.transpose(0, 1), **SAME)


def test_ragged_blocks_of_samples():
    """Each sample with its own context, as an I-JEPA predictor without truncation has them."""
    q, k, v = heads(20, 2, 16)
    out = attend(q, k, v, mask=Ragged([0, 9, 20]) & Blocks([4, 6], [[2, 3], [5, 0]]))
    for begin, end, context, sizes in ((0, 9, 4, [2, 3]), (9, 20, 6, [5, 0])):
        three = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
        alone = attend(*three, mask=Blocks(context, sizes))
        torch.testing.assert_close(out[begin:end], alone[0].transpose(0, 1), **SAME)


def test_blocks_share_what_the_context_is_without_them():
    """The context's rows are those of the context alone, each block's those of the two alone."""
    q, k, v = heads(1, 2, 12, 16)
    out = attend(q, k, v, mask=Blocks(5, [4, 3]))
    context = attend(*(x[:, :, :5] for x in (q, k, v)))
    torch.testing.assert_close(out[:, :, :5], context, **SAME)
    rows = [0, 1, 2, 3, 4, 9, 10, 11]
    pair = attend(*(x[:, :, rows] for x in (q, k, v)), mask=Blocks(5, [3]))
    torch.testing.assert_close(out[:, :, 9:], pair[:, :, 5:], **SAME)


@pytest.mark.parametrize(
    "mask", [KeyPadding([0, 3]), torch.tensor([[False] * 6, [True] * 6])], ids=["lengths", "keep"]
)
def test_a_query_without_keys_gives_zeros(mask):
    inputs = heads(2, 2, 6, 16)
    out = attend(*inputs, mask=mask)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    for grad in torch.autograd.grad(out.square().sum(), inputs):
        assert torch.equal(grad[0], torch.zeros_like(grad[0]))
        assert grad[1].abs().sum() > 0


@pytest.mark.parametrize("layout", ["vjepa2", "axial"])
def test_gradcheck(layout):
    rope = Rope3d((1, 2, 3), torch.tensor([5, 0, 3, 1]), layout=layout)
    mask = KeyPadding([4, 2]) & FrameCausal(2)
    inputs = heads(2, 1, 4, 16)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, mask=mask, rope=rope), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x, mask=mask), inputs)


def rotated_by_hand(x, positions, layout, theta=10000.0):
    """One token's head [d], written out pair by pair; positions: one an axis."""
    dim, axes = x.shape[0], len(positions)
    part = 2 * ((dim // axes) // 2)
    out = x.clone()
    for axis, position in enumerate(positions):
        for i in range(part // 2):
            angles = []
            for j in (2 * i, 2 * i + 1):
                f = j % (part // 2) if layout == "vjepa2" else i
                angles.append(position * theta ** (-2.0 * f / part))
            a, b = (torch.tensor(angle, dtype=torch.float64) for angle in angles)
            even, odd = axis * part + 2 * i, axis * part + 2 * i + 1
            out[even] = x[even] * a.cos() - x[odd] * a.sin()
            out[odd] = x[odd] * b.cos() + x[even] * b.sin()
    return out


@pytest.mark.parametrize("layout", ["vjepa2", "axial"])
@pytest.mark.parametrize("dim", [16, 32, 40, 64, 80, 88, 128])
@pytest.mark.parametrize("grid", [(3, 4, 5), (4, 5), (7,)])
def test_rotation_pair_by_pair(grid, dim, layout):
    places = [0, 1, 6] if len(grid) == 1 else [0, 7, 19]
    x = torch.randn(1, 1, 3, dim, dtype=torch.float64)
    rope = Rope3d(grid, torch.tensor(places), layout=layout)
    out = apply_rope(x, rope, **REFERENCE)
    for token, place in enumerate(places):
        positions = torch.unravel_index(torch.tensor(place), grid)
        expected = rotated_by_hand(x[0, 0, token], [p.item() for p in positions], layout)
        torch.testing.assert_close(out[0, 0, token], expected, **SAME)


@pytest.mark.parametrize("dim", [32, 64, 80])
def test_the_parts_of_the_published_head_dims(dim):
    """64: 20 + 20 + 20 + 4; 80: 26 * 3 + 2; 32: 10 * 3 + 2; the rest is left alone."""
    part = {32: 10, 64: 20, 80: 26}[dim]
    assert Rope3d((2, 2, 2)).part(dim) == part
    x = torch.randn(1, 1, 8, dim, dtype=torch.float64)
    out = apply_rope(x, Rope3d((2, 2, 2)), **REFERENCE)
    assert torch.equal(out[..., 3 * part :], x[..., 3 * part :])
    assert not torch.equal(out[..., 3 * part - 2], x[..., 3 * part - 2])


def test_the_right_order_keeps_relative_position_and_the_published_one_does_not():
    """Scores of the right order depend on the difference of places alone."""
    q, k = (torch.randn(1, 1, 1, 64, dtype=torch.float64) for _ in range(2))

    def score(layout, i, j):
        a, b = (Rope3d((64,), torch.tensor([n]), layout=layout) for n in (i, j))
        return (apply_rope(q, a, **REFERENCE) * apply_rope(k, b, **REFERENCE)).sum()

    shift = (score("axial", 3, 9) - score("axial", 23, 29)).abs()
    assert shift < 1e-12
    assert (score("vjepa2", 3, 9) - score("vjepa2", 23, 29)).abs() > 1e-3


def test_the_table_is_the_reference_in_float32():
    rope = Rope3d((3, 4, 5))
    table = rope.table(40, torch.device("cpu"))
    assert table.shape == (12, 12, 2)
    for row, position in ((2, 2), (3, 0), (6, 3), (11, 4)):
        angles = rope.angles(torch.tensor(float(position), dtype=torch.float64), 40)
        expected = torch.stack((angles.cos(), angles.sin()), dim=-1).float()
        assert torch.equal(table[row], expected)


def test_rope_inside_is_rope_before():
    q, k, v = heads(2, 2, 9, 24)
    places = torch.stack([torch.randperm(24)[:9] for _ in range(2)])
    rope = Rope3d((2, 3, 4), places)
    inside = attend(q, k, v, rope=rope)
    before = attend(*(apply_rope(x, rope, **REFERENCE) for x in (q, k)), v)
    torch.testing.assert_close(inside, before, **SAME)


def test_keys_with_places_of_their_own():
    q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.float64) for n in (3, 5, 5))
    rope = Rope3d((6, 2), torch.tensor([1, 8, 3]), torch.tensor([0, 11, 4, 2, 7]))
    turned = apply_rope(k, Rope3d((6, 2), rope.key_index), **REFERENCE)
    expected = sdpa(apply_rope(q, Rope3d((6, 2), rope.index), **REFERENCE), turned, v)
    torch.testing.assert_close(attend(q, k, v, rope=rope), expected, **SAME)


def test_places_in_packed_samples_begin_anew():
    x = torch.randn(7, 2, 16, dtype=torch.float64)
    offsets = torch.tensor([0, 3, 7])
    out = apply_rope(x, Rope3d((5,)), offsets=offsets, **REFERENCE)
    for begin, end in ((0, 3), (3, 7)):
        alone = apply_rope(x[begin:end].transpose(0, 1)[None], Rope3d((5,)), **REFERENCE)
        torch.testing.assert_close(out[begin:end], alone[0].transpose(0, 1), **SAME)


def test_padding_may_hold_anything():
    """What padding hides is not read: a NaN there changes nothing."""
    q, k, v = heads(2, 2, 6, 16)
    mask = KeyPadding([4, 5])
    expected = attend(q, k, v, mask=mask)
    with torch.no_grad():
        k, v = k.clone(), v.clone()
        k[0, :, 4:] = v[0, :, 4:] = torch.nan
    out = attend(q, k, v, mask=mask)
    torch.testing.assert_close(out, expected, **SAME)


def test_jagged_nested_tensors():
    lengths = (4, 0, 6)
    for transposed in (False, True):
        parts = [torch.randn(n, 2, 16, dtype=torch.float64, requires_grad=True) for n in lengths]
        jagged = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
        given = jagged.transpose(1, 2) if transposed else jagged
        out = attend(given, given, given, mask=FrameCausal(2))
        assert out.is_nested
        assert out.layout == torch.jagged
        assert out._ragged_idx == given._ragged_idx
        rows = (out.transpose(1, 2) if transposed else out).unbind()
        total = sum((row * row).sum() for row in rows)
        gradients = torch.autograd.grad(total, [parts[0], parts[2]])
        for part, row, grad in zip(
            (parts[0], parts[2]), (rows[0], rows[2]), gradients, strict=True
        ):
            x = part.detach().transpose(0, 1)[None].requires_grad_()
            alone = attend(x, x, x, mask=FrameCausal(2))
            torch.testing.assert_close(row, alone[0].transpose(0, 1), **SAME)
            (expected,) = torch.autograd.grad((alone * alone).sum(), x)
            torch.testing.assert_close(grad, expected[0].transpose(0, 1), **SAME)


def test_module_is_its_projections_around_the_op():
    module = MaskedAttention(48, 3, backend="reference").double()
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    three = (x @ module.qkv.weight.T + module.qkv.bias).view(2, 7, 3, 3, 16).permute(2, 0, 3, 1, 4)
    mixed = sdpa(*three).transpose(1, 2).reshape(2, 7, 48)
    expected = mixed @ module.proj.weight.T + module.proj.bias
    torch.testing.assert_close(module(x), expected, **SAME)
    packed = module(x.flatten(0, 1), mask=Ragged([0, 7, 14]))
    torch.testing.assert_close(packed, expected.flatten(0, 1), **SAME)
    jagged = torch.nested.nested_tensor(list(x), layout=torch.jagged)
    torch.testing.assert_close(torch.stack(module(jagged).unbind()), expected, **SAME)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_is_computed_in_float32_and_rounded_once(half):
    q, k, v = (torch.randn(2, 2, 9, 16).to(half) for _ in range(3))
    out = attend(q, k, v, rope=Rope3d((9,)))
    assert out.dtype == half
    assert torch.equal(out, attend(q.float(), k.float(), v.float(), rope=Rope3d((9,))).to(half))
