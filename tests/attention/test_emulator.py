"""Tier 3: the bodies of the attention op's CUDA kernels, and what launches them, against the
float64 reference. The emulator runs them on CPU tensors behind the public functions, as backend
"cuda".
"""

from __future__ import annotations

import pytest
import torch

from tests.attention import cases
from tests.attention.cases import HEAD_DIMS, LAYOUTS, RULES, draw, hold
from tests.helpers import native
from tests.helpers.tolerances import assert_close_to_truth
from vicreg_kernels.attention import (
    Blocks,
    FrameCausal,
    KeyPadding,
    Ragged,
    Rope3d,
    apply_rope,
    contract,
    masked_attention,
)
from vicreg_kernels.core import dispatch, loader

HALVES = (torch.bfloat16, torch.float16)
NAN = float("nan")


@pytest.fixture(scope="module")
def kernels() -> contract.Kernels:
    torch.ops.load_library(str(native.emulated("attention")))
    return loader.compiled("attention", contract.Kernels, "vicreg_kernels_emulator")


@pytest.fixture(autouse=True)
def emulated(kernels, monkeypatch):
    monkeypatch.setattr(loader, "load", lambda op, kind, name: {"cuda": kernels}[name])
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)


def check(rules=(), **settings):
    """Hold the emulated kernels to the one rule of tolerances.py, for a drawn call."""
    settings.setdefault("dtype", torch.bfloat16)
    return hold("cuda", draw(rules, **settings).wanting(True, True, True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [*HEAD_DIMS, 24, 112, 120])
def test_head_dims(dim, dtype):
    check(dim=dim, tokens=21, keys=37, dtype=dtype)
    check(["window"], dim=dim, tokens=21, keys=37, dtype=dtype, axes=3)


@pytest.mark.parametrize(
    ("tokens", "keys"),
    [(1, 1), (1, 40), (40, 1), (15, 16), (16, 17), (33, 64), (65, 48), (70, 70), (112, 97)],
)
def test_lengths(tokens, keys):
    check(tokens=tokens, keys=keys, dim=40)


@pytest.mark.parametrize(
    ("tokens", "keys", "dim", "rules"),
    [
        (130, 130, 32, ["frames"]),
        (256, 256, 16, []),
        (256, 144, 16, ["keep"]),  # nine tiles of keys: two passes of five warps
        (150, 256, 128, ["window"]),
    ],
)
def test_more_keys_than_one_pass_of_the_warps(tokens, keys, dim, rules):
    """Gradients of the queries are then summed over passes."""
    check(rules, tokens=tokens, keys=keys, dim=dim, batch=1, heads_=2, axes=3, tokens_per_frame=30)
    if not rules:
        check(["ragged"], lengths=[256, 0, 17], dim=dim, heads_=1)


COMBINED = [
    ("lengths", "frames"),
    ("keep", "window"),
    ("keep", "blocks"),
    ("lengths", "window", "blocks"),
    ("ragged", "frames"),
    ("ragged", "window", "blocks"),
    ("ragged_keys", "window"),
]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rules", [*((rule,) for rule in RULES), *COMBINED], ids="-".join)
def test_rules(rules, dtype):
    for axes in (0, 3):
        check(rules, batch=4, tokens=38, keys=51, dim=32, axes=axes, dtype=dtype)


def test_ragged_with_empty_samples():
    for lengths, key_lengths in (
        ([0, 5, 0, 33, 1, 0], None),
        ([7, 0, 20], [0, 9, 40]),
    ):
        rules = ["ragged"] if key_lengths is None else ["ragged_keys"]
        check(rules, lengths=lengths, key_lengths=key_lengths, dim=24, axes=2)
    nothing = draw(["ragged"], lengths=[0, 0], dim=24, dtype=torch.bfloat16)
    assert [x.shape for x in run(nothing)] == [(0, 2, 24)] * 4


@pytest.mark.parametrize("layout", ["vjepa2", "axial"])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("dim", [16, 80, 88])
def test_rotary_position(dim, axes, layout):
    check(dim=dim, axes=axes, rope_layout=layout, tokens=20)
    check(dim=dim, axes=axes, rope_layout=layout, tokens=20, keys=33, indexed=True)
    check(["ragged"], dim=dim, axes=axes, rope_layout=layout, tokens=20, indexed=axes == 3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_misaligned_data(layout, dtype):
    check(layout=layout, dim=40, tokens=19, dtype=dtype, axes=3)
    check(["ragged"], layout=layout, dim=40, tokens=19, dtype=dtype)


def test_strided_incoming_gradient():
    call = draw(dim=40, tokens=19, dtype=torch.bfloat16).wanting(True, True, True)
    for layout in LAYOUTS:
        hold("cuda", call, cases.heads(2, 2, 19, 40, layout=layout, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "grads", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)]
)
def test_gradients_of_a_subset(grads):
    call = draw(["frames"], tokens=35, dim=32, axes=3, dtype=torch.bfloat16)
    cotangent = torch.randn(call.q.shape).bfloat16()
    everything = cases.run("cuda", call.wanting(True, True, True), cotangent)[1]
    gradients = cases.run("cuda", call.wanting(*map(bool, grads)), cotangent)[1]
    for mine, together, wanted in zip(gradients, everything, grads, strict=True):
        assert (mine is not None) == bool(wanted)
        assert mine is None or torch.equal(mine, together)


@pytest.mark.parametrize("scale", [0.0, -0.3, 4.0])
def test_scale(scale):
    check(tokens=20, scale=scale, dtype=torch.float16)


@pytest.mark.parametrize("shared", [100_000, 60_000, 40_000])
def test_devices_with_less_shared_memory(shared, monkeypatch):
    """Keys are then taken in chunks, and fewer queries at a time in the backward."""
    monkeypatch.setenv("EMULATOR_SHARED", str(shared))
    if shared == 40_000:
        check(["window"], tokens=100, keys=130, dim=32, axes=3, batch=1)
    else:
        check(["frames"], tokens=40, keys=200 if shared == 100_000 else 90, dim=128, batch=1)


def test_too_little_shared_memory_is_an_error(monkeypatch):
    monkeypatch.setenv("EMULATOR_SHARED", "10000")
    with pytest.raises(RuntimeError, match=r"needs \d+ bytes of shared memory"):
        check(tokens=100, dim=128)


def run(call, cotangent=None):
    """Output, then all gradients."""
    cotangent = torch.ones_like(call.q) if cotangent is None else cotangent
    out, grads = cases.run("cuda", call.wanting(True, True, True), cotangent)
    return [out, *grads]


def test_hidden_keys_and_padding_leak_nothing():
    """What no query sees may hold anything; so may queries that see nothing."""
    masks = {
        "lengths": KeyPadding([20, 0]),
        "keep": KeyPadding(torch.arange(40).expand(2, 40) % 3 == 1),
        "blocks": Blocks(10, [6, 5]),
        "frames": FrameCausal(7),
    }
    hidden = {
        "lengths": torch.stack((torch.arange(40) >= 20, torch.arange(40) >= 0)),
        "keep": torch.arange(40).expand(2, 40) % 3 != 1,
        "blocks": (torch.arange(40) >= 21).expand(2, 40),
        "frames": (torch.arange(40) >= 21).expand(2, 40),  # with 20 queries: of 3 frames
    }
    for name, mask in masks.items():
        tokens = 20 if name == "frames" else 40
        call = draw(tokens=tokens, keys=40, dim=32, axes=3, dtype=torch.bfloat16)
        call = cases.replace(call, mask=mask)
        wanted = run(call)
        where = hidden[name][:, None, :, None].expand(call.k.shape)
        for bad in (NAN, float("inf")):
            poisoned = cases.replace(
                call, k=call.k.masked_fill(where, bad), v=call.v.masked_fill(where, bad)
            )
            if name == "lengths":
                poisoned.q[1] = bad  # sees no key
            for mine, clean in zip(run(poisoned), wanted, strict=True):
                assert torch.equal(mine, clean), name
        assert not wanted[2][where].any()
        assert not wanted[3][where].any()


def test_tiles_that_no_query_of_a_tile_sees_are_skipped():
    """NaN in one frame of 16 tokens stays with the queries that see the frame."""
    call = draw(tokens=96, keys=96, dim=32, batch=1, dtype=torch.bfloat16)
    call = cases.replace(call, mask=FrameCausal(16, window=2))
    wanted = run(call)
    k, v = call.k.clone(), call.v.clone()
    k[:, :, 48:64] = v[:, :, 48:64] = NAN  # seen by queries 48 to 79
    out, dq, dk, dv = run(cases.replace(call, k=k, v=v))
    seers = torch.zeros(96, dtype=torch.bool)
    seers[48:80] = True
    for mine, clean in ((out, wanted[0]), (dq, wanted[1])):
        assert mine[:, :, seers].isnan().all()
        assert torch.equal(mine[:, :, ~seers], clean[:, :, ~seers])
    far = torch.ones(96, dtype=torch.bool)
    far[32:80] = False  # keys that no spoilt query sees
    for mine, clean in ((dk, wanted[2]), (dv, wanted[3])):
        assert torch.equal(mine[:, :, far], clean[:, :, far])


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_queries_that_see_nothing_beside_others_that_do(bad):
    """Queries 14 to 39 see no key, 0 to 13 do: tile 0 has both. 0 times what they hold is not 0."""
    call = draw(tokens=40, keys=40, dim=32, batch=2, axes=3, dtype=torch.bfloat16)
    call = cases.replace(call, mask=KeyPadding([10, 10]) & FrameCausal(7, window=1))
    wanted = run(call)
    poisoned = cases.replace(call, q=call.q.clone())
    poisoned.q[:, :, 14:] = bad
    for mine, clean in zip(run(poisoned), wanted, strict=True):
        assert torch.equal(mine, clean)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_and_inf_in_what_is_seen_spread(which, bad):
    call = draw(["ragged"], lengths=[20, 18], dim=32, dtype=torch.bfloat16)
    getattr(call, which)[3, 1, 5] = bad  # of sample 0, head 1
    out, dq, dk, dv = run(call)
    for x in (out, dq, dk, dv):
        assert x[:, 0].isfinite().all(), "the other head"
        assert x[20:].isfinite().all(), "the other sample"
    dense = (x[:20].transpose(0, 1).unsqueeze(0) for x in call.inputs)
    wanted = masked_attention(*dense, backend="reference").squeeze(0).transpose(0, 1)
    # a key of -inf has no weight by the formula; here its infinite score may make its query NaN
    kept = ~out[:20].isnan() if which == "k" and bad == float("inf") else torch.tensor(True)
    assert torch.equal(out[:20].isnan() & kept, wanted.isnan() & kept)
    assert torch.equal(out[:20].isinf() & kept, wanted.isinf() & kept)
    assert out[:20][wanted.isnan()].isnan().all()
    spoilt = ~wanted.isfinite().all(dim=-1)
    assert spoilt.any()
    assert dq[:20][spoilt].isnan().any(dim=-1).all()


def test_a_product_past_float32_leaves_no_key_out():
    cases.hold_past_float32("cuda", torch.bfloat16, exact=False)


def test_a_query_without_keys_gives_zeros(kernels):
    q, k, v = (torch.randn(2, 3, 20, 32).half() for _ in range(3))
    lengths = torch.tensor([0, 9], dtype=torch.int32)
    rules = (None, None, lengths, None, None, 20, 20, 0, 0, None, None, None, [1, 1, 1, 0])
    out, lse = kernels.forward(q, k, v, *rules, 0.2)
    assert not out[0].any()
    assert (lse[0] == -float("inf")).all()
    scores = 0.2 * q.double() @ k.double().mT
    torch.testing.assert_close(
        lse[1].double(), scores[1, :, :, :9].exp().sum(-1).log2(), rtol=1e-3, atol=1e-3
    )
    assert out.transpose(1, 2).is_contiguous()
    grads = kernels.backward(out, q, k, v, out, lse, *rules, True, True, False, 0.2)
    assert not grads[0][0].any()
    assert not grads[1][0].any()
    assert grads[2].shape == (0,)
    assert all(g.transpose(1, 2).is_contiguous() for g in grads[:2])


@pytest.mark.parametrize("rules", [(), ("ragged", "window")], ids=str)
def test_any_order_of_warps_gives_the_same_bits(rules, monkeypatch):
    call = draw(rules, tokens=150, batch=1, heads_=2, dim=16, axes=3, dtype=torch.bfloat16)
    before = [x.clone() for x in call.inputs]
    cotangent = torch.randn(call.q.shape).bfloat16()

    def bits(seed):
        monkeypatch.setenv("EMULATOR_SEED", str(seed))
        return run(call, cotangent)

    first = bits(0)
    for seed in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, bits(seed), strict=True))
    assert all(torch.equal(x, kept) for x, kept in zip(call.inputs, before, strict=True))


ROTATED = (torch.float32, *HALVES)


@pytest.mark.parametrize("dtype", ROTATED, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_alone(layout, dtype):
    for axes, order in ((3, "vjepa2"), (2, "axial"), (1, "vjepa2")):
        for dim in (16, 40, 88):
            x = cases.heads(2, 3, 45, dim, layout=layout, dtype=dtype)
            rope = Rope3d(cases.grid_for(45, axes), layout=order)
            index = torch.randint(0, rope.places, (2, 45))
            for turning in (rope, Rope3d(rope.grid[3 - axes :], index, layout=order)):
                hold_rotation(x, turning)


def hold_rotation(x, rope, offsets=None):
    grad = torch.randn(x.shape).to(x.dtype)

    def both(x, backend):
        leaf = x.detach().requires_grad_()
        out = apply_rope(leaf, rope, offsets=offsets, backend=backend)
        return out.detach(), torch.autograd.grad(out, leaf, grad.to(x.dtype))[0]

    actual, truth, plain = both(x, "cuda"), both(x.double(), "reference"), both(x, "reference")
    for mine, true, formula in zip(actual, truth, plain, strict=True):
        assert mine.dtype == x.dtype
        assert_close_to_truth(mine, true, formula, x.dtype, 2, "rotation")


@pytest.mark.parametrize("dtype", ROTATED, ids=str)
def test_rotation_of_packed_tokens(dtype):
    offsets = torch.tensor([0, 0, 7, 7, 7, 30, 31, 31])
    x = torch.randn(31, 2, 40).to(dtype)
    hold_rotation(x, Rope3d((4, 3, 2)), offsets)
    hold_rotation(x, Rope3d((40,), torch.arange(31).flip(0)))
    assert apply_rope(x[:0], Rope3d((4, 3)), backend="cuda").shape == (0, 2, 40)


def test_cuda_takes_what_fits():
    q = torch.randn(1, 1, 257, 16).bfloat16()
    with pytest.raises(RuntimeError, match="at most 256 tokens"):
        masked_attention(q, q, q, backend="cuda")
    q = torch.randn(1, 1, 8, 16)
    with pytest.raises(RuntimeError, match="not float32"):
        masked_attention(q, q, q, backend="cuda")
    packed = torch.randn(300, 1, 16).bfloat16()
    offsets = torch.tensor([0, 100, 300])
    assert (
        masked_attention(packed, packed, packed, mask=Ragged(offsets), backend="cuda")
        .isfinite()
        .all()
    )


SANITIZED = """
import sys, torch
from tests.helpers import native
sys.path.insert(0, ".")
from tests.attention import cases
from vicreg_kernels.core import dispatch, loader
from vicreg_kernels.attention import contract
library, mode = sys.argv[1:]
torch.ops.load_library(library)
kernels = loader.compiled("attention", contract.Kernels, "vicreg_kernels_emulator")
loader.load = lambda op, kind, name: kernels
dispatch.missing = lambda *_: None
torch.manual_seed(0)
if mode == "short":
    q, k, v = (torch.randn(1, 1, 40, 16).half() for _ in range(3))
    rules = (None,) * 5 + (40, 40, 0, 0, None, None, None, [1, 1, 1, 0])
    out, lse = kernels.forward(q, k, v, *rules, 0.2)
    kernels.backward(out, q, k, v, out, native.shortened(lse), *rules, True, True, True, 0.2)
for i, (dim, tokens, keys) in enumerate(((16, 1, 1), (24, 33, 20), (80, 17, 40), (128, 20, 18))):
    rules = ((), ("keep",), ("lengths", "window"), ("blocks",), ("ragged", "frames"))
    for j, rule in enumerate(rules):
        layout = ("heads", "sliced")[(i + j) % 2]
        call = cases.draw(rule, batch=2, tokens=tokens, keys=keys, dim=dim, layout=layout,
                          axes=3, indexed=True, dtype=torch.bfloat16)
        cases.hold("cuda", call.wanting(True, True, True))
call = cases.draw(["window"], tokens=150, keys=150, dim=16, batch=1, dtype=torch.float16)
cases.hold("cuda", call.wanting(True, True, True))
print("clean")
"""


def run_sanitized(mode):
    return native.run_sanitized(SANITIZED, native.emulated("attention", sanitize=True), mode)


@pytest.mark.thorough
def test_sanitized():
    done = run_sanitized("plain")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


@pytest.mark.thorough
def test_the_sanitizer_sees_a_short_tensor():
    done = run_sanitized("short")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
