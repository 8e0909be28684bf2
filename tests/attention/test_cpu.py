"""Tier 2: the fused attention backends against the float64 reference.

Written for the C++ CPU kernels and run on every fused backend the machine has: the `gpu` marked
cases are the same tests on CUDA tensors.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.attention import cases
from vicreg_kernels.attention import (
    FrameCausal,
    KeyPadding,
    Ragged,
    Rope3d,
    apply_rope,
    masked_attention,
)
from vicreg_kernels.core import dispatch

ALL = (True, True, True)
HALVES = (torch.bfloat16, torch.float16)
COMBINED = [(rule,) for rule in cases.RULES] + [
    ("lengths", "frames"),
    ("keep", "window"),
    ("lengths", "blocks", "window"),
    ("keep", "blocks", "frames"),
    ("ragged", "frames", "blocks"),
    ("ragged", "window"),
]


def hold(fused, call, cotangent=None, grads=ALL):
    reason = cases.cannot_run(fused.name, call)
    if reason is not None:
        pytest.skip(f"{fused.name}: {reason}")
    return cases.hold(fused.name, call.wanting(*grads), cotangent)


# 1 to just past the sizes that tiles, panels and chunks are made of.
@pytest.mark.triton_takes(lambda tokens, **_: tokens in (1, 257))
@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16, 17, 47, 49, 63, 64, 65, 129, 257])
def test_lengths(fused, tokens):
    hold(fused, cases.draw(tokens=tokens, batch=1, device=fused.device))


@pytest.mark.triton_takes(lambda tokens, **_: tokens in (66, 2049))
@pytest.mark.parametrize(("tokens", "keys"), [(481, 480), (66, 961), (1025, 33), (2049, 2049)])
def test_long(fused, tokens, keys):
    call = cases.draw(tokens=tokens, keys=keys, batch=1, heads_=1, device=fused.device)
    hold(fused, call)


@pytest.mark.triton_takes(lambda tokens, **_: tokens in (1, 33))
@pytest.mark.parametrize(("tokens", "keys"), [(1, 70), (70, 1), (33, 100), (100, 33), (5, 64)])
def test_other_keys_than_queries(fused, tokens, keys):
    hold(fused, cases.draw(tokens=tokens, keys=keys, device=fused.device))


@pytest.mark.triton_takes(lambda dim, **_: dim == 112)
@pytest.mark.parametrize("dim", [16, 24, 32, 40, 48, 64, 72, 80, 88, 96, 104, 112, 120, 128])
def test_head_dims(fused, dim):
    hold(fused, cases.draw(tokens=67, dim=dim, batch=1, axes=3, device=fused.device))


@pytest.mark.triton_takes(lambda rules, tokens, **_: tokens == 150 and rules in COMBINED[10::2])
@pytest.mark.parametrize("rules", COMBINED, ids="+".join)
@pytest.mark.parametrize("tokens", [37, 150])
def test_rules(fused, rules, tokens):
    call = cases.draw(
        rules, batch=3, tokens=tokens, tokens_per_frame=tokens // 5, device=fused.device
    )
    hold(fused, call)


@pytest.mark.triton_takes(lambda rules, **_: rules == ("window",))
@pytest.mark.parametrize("rules", [("frames",), ("window",), ("blocks",), ("keep", "blocks")])
def test_rules_over_many_chunks(fused, rules):
    """Long enough that a sample and head is shared by several tasks."""
    call = cases.draw(
        rules, batch=1, heads_=1, tokens=1100, tokens_per_frame=129, device=fused.device
    )
    hold(fused, call)


@pytest.mark.parametrize("key_lengths", [None, [5, 0, 3, 40, 0], [0, 0, 0, 0, 0]])
def test_ragged_with_empty_and_full_samples(fused, key_lengths):
    rules = ("ragged",) if key_lengths is None else ("ragged_keys",)
    lengths = [0, 64, 1, 130, 0]
    call = cases.draw(rules, lengths=lengths, key_lengths=key_lengths, device=fused.device)
    out, grads = hold(fused, call)
    if key_lengths is not None:
        unseen = torch.repeat_interleave(torch.tensor(key_lengths) == 0, torch.tensor(lengths)).to(
            fused.device
        )
        assert (out[unseen] == 0).all()
        assert (grads[0][unseen] == 0).all()


def test_no_token_at_all(fused):
    dtype = torch.bfloat16 if fused.name == "cuda" else torch.float32  # what it takes
    call = cases.draw(("ragged",), lengths=[0, 0], dtype=dtype, device=fused.device).wanting(*ALL)
    out, grads = cases.run(fused.name, call, torch.zeros_like(call.q))
    assert out.shape == call.q.shape
    assert all(g.numel() == 0 for g in grads)


def test_a_query_that_sees_nothing(fused):
    mask = KeyPadding(torch.tensor([0, 9], device=fused.device))
    call = replace(cases.draw(tokens=9, device=fused.device), mask=mask)
    out, grads = hold(fused, call)
    for result in (out, *grads):
        assert (result[0] == 0).all()
        assert (result[1] != 0).any()


@pytest.mark.triton_takes(
    lambda rules, layout, dtype, **_: (dtype == torch.float32 and not rules and layout == "sliced")
)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("rules", [(), ("ragged",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(fused, rules, layout, dtype):
    call = cases.draw(rules, tokens=43, axes=2, layout=layout, dtype=dtype, device=fused.device)
    hold(fused, call)


@pytest.mark.triton_takes(lambda **_: False)  # its kernels in half: test_attention_gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rules", [(), ("keep",), ("window",), ("ragged",), ("blocks",)])
def test_half(fused, rules, dtype):
    call = cases.draw(rules, tokens=130, dim=80, axes=3, dtype=dtype, device=fused.device)
    hold(fused, call)


@pytest.mark.triton_takes(lambda axes, **_: axes == 3)
@pytest.mark.parametrize("grads", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
@pytest.mark.parametrize("axes", [0, 3])
def test_gradient_of_any_input(fused, grads, axes):
    call = cases.draw(("window",), tokens=70, axes=axes, device=fused.device)
    cotangent = torch.randn(call.q.shape).to(fused.device)
    _, alone = hold(fused, call, cotangent, tuple(map(bool, grads)))
    _, together = cases.run(fused.name, call.wanting(*ALL), cotangent)
    for one, other, wanted in zip(alone, together, grads, strict=True):
        assert (one is not None) == bool(wanted)
        assert one is None or torch.equal(one, other)


def test_no_gradient_wanted(fused):
    call = cases.draw(device=fused.device)
    assert not masked_attention(*call.inputs, backend=fused.name).requires_grad


@pytest.mark.triton_takes(lambda rules, **_: not rules)
@pytest.mark.parametrize("rules", [(), ("ragged",)])
def test_incoming_gradients_of_any_strides(fused, rules):
    call = cases.draw(rules, tokens=33, device=fused.device)
    shape = call.q.shape
    expanded = torch.tensor(0.7, device=fused.device).expand(shape)  # as sum() gives
    every_other = torch.randn(*shape[:-1], 2 * shape[-1]).to(fused.device)[..., ::2]
    turned = torch.randn(shape[::-1]).to(fused.device).permute(*reversed(range(len(shape))))
    for cotangent in (expanded, every_other, turned):
        hold(fused, call, cotangent)


@pytest.mark.parametrize("scale", [100.0, -3.0, 0.0, 1e-3])
def test_scales(fused, scale):
    """100: scores of thousands, far past what exp can take without the row's maximum."""
    hold(fused, cases.draw(tokens=70, scale=scale, device=fused.device))


def test_weights_are_exact_to_a_few_roundings(fused):
    """One query and two keys, of which the second is weighed 1 / (1 + exp(-x))."""
    x = torch.linspace(-1.0, 0.0, 2001, device=fused.device)
    q, k, v = (torch.zeros(2001, 1, n, 32, device=fused.device) for n in (1, 2, 2))
    q[:, 0, 0, 0] = x
    k[:, 0, 1, 0] = 1.0
    v[:, 0, 1, 0] = 1.0
    call = cases.Call(q, k, v, scale=1.0)
    if cases.cannot_run(fused.name, call):
        pytest.skip("not for this backend")
    weights = masked_attention(*call.inputs, backend=fused.name, scale=1.0)[:, 0, 0, 0].double()
    truth = torch.sigmoid(x.double())
    assert ((weights - truth).abs() / truth).max() < 8 * torch.finfo(torch.float32).eps


def test_growing_scores(fused):
    """Every later chunk of keys raises the running maximum."""
    call = cases.draw(tokens=40, keys=1500, batch=1, heads_=1, device=fused.device)
    ramp = torch.linspace(0.0, 4.0, 1500, device=fused.device)[:, None]
    hold(fused, replace(call, k=call.k + ramp * call.q.mean(dim=2, keepdim=True)))


# What Triton compiles of the product below: every number of axes and both layouts.
ROTATIONS = {
    ((), True): ("axial", 3),
    (("ragged",), False): ("axial", 2),
    (("ragged_keys",), True): ("axial", 1),
}


@pytest.mark.triton_takes(
    lambda rules, indexed, layout, axes, **_: ROTATIONS.get((rules, indexed)) == (layout, axes)
)
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("layout", ["vjepa2", "axial"])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("rules", [(), ("ragged",), ("ragged_keys",)])
def test_rope(fused, rules, indexed, layout, axes):
    call = cases.draw(
        rules, tokens=41, keys=53, axes=axes, indexed=indexed, rope_layout=layout,
        device=fused.device,
    )  # fmt: skip
    hold(fused, call)


def test_rope_index_shared_by_the_batch(fused):
    call = cases.draw(tokens=20, device=fused.device)
    index = torch.randperm(64, device=fused.device)[:20]
    hold(fused, replace(call, rope=Rope3d((4, 4, 4), index)))


@pytest.mark.triton_takes(
    lambda rules, dtype, axes, **_: (
        axes == 3 - bool(rules) and dtype in (torch.float32, torch.float16 if rules else None)
    )
)
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rules", [(), ("ragged",)])
def test_apply_rope(fused, rules, dtype, axes):
    """And its adjoint, to the second derivative."""
    call = cases.draw(rules, tokens=45, dim=40, axes=axes, dtype=dtype, device=fused.device)
    offsets = call.mask.tensors.own["offsets"] if rules else None
    cotangent = torch.randn(call.q.shape).to(call.q)

    def run(backend, x, cotangent):
        x, cotangent = x.detach().requires_grad_(), cotangent.detach().requires_grad_()
        out = apply_rope(x, call.rope, offsets=offsets, backend=backend)
        (grad,) = torch.autograd.grad(out, x, cotangent, create_graph=True)
        (again,) = torch.autograd.grad(grad, cotangent, x)
        return out, grad, again

    actual = run(fused.name, call.q, cotangent)
    truth = run("reference", call.q.double(), cotangent.double())
    plain = run("reference", call.q, cotangent)
    for name, *values in zip(("out", "adjoint", "again"), actual, truth, plain, strict=True):
        cases.assert_close_to_truth(*values, dtype, 32, name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["k", "v"])
@pytest.mark.parametrize("rules", ["padding", "frames", "ragged"])
def test_not_finite_reaches_who_may_see_it(fused, rules, what, bad):
    """And nobody else, neither by 0 * NaN nor across samples."""
    call = cases.draw(tokens=60, batch=2, device=fused.device)
    if cases.cannot_run(fused.name, call):
        pytest.skip("not for this backend")
    # frames: within the first tile of queries, which others see less of
    token, sample = 20 if rules == "frames" else 41, 0
    if rules == "padding":
        mask = KeyPadding(torch.tensor([41, 60], device=fused.device))
        reached = torch.zeros(2, 60, dtype=torch.bool)
    elif rules == "frames":
        mask = FrameCausal(7)
        reached = torch.zeros(2, 60, dtype=torch.bool)
        reached[0, 14:] = True
    else:
        packed = (x.transpose(1, 2).flatten(0, 1) for x in call.inputs)
        call = cases.Call(*packed)
        mask = Ragged(torch.tensor([0, 41, 60, 120], device=fused.device))
        reached = torch.zeros(120, dtype=torch.bool)
        reached[41:60] = True
    poisoned = getattr(call, what).clone()
    if rules == "ragged":
        poisoned[token, :, 3] = bad
    else:
        poisoned[sample, :, token, 3] = bad
    call = replace(call, mask=mask, **{what: poisoned}).wanting(*ALL)
    cotangent = torch.randn(call.q.shape).to(fused.device)
    out, grads = cases.run(fused.name, call, cotangent)
    heads_last = out if rules == "ragged" else out.transpose(1, 2)
    finite = heads_last.isfinite().all(dim=-1).all(dim=-1).cpu()
    # +-inf in a key gives a weight of 0 where the score is -inf
    some = heads_last.isfinite().flatten(-2).all(dim=-1).cpu()
    assert finite[~reached].all()
    assert not some[reached].any() or (what == "k" and bad == float("inf"))
    clean = replace(call, **{what: torch.nan_to_num(poisoned, 0.0, 0.0)}).wanting(*ALL)
    expected, expected_grads = cases.run(fused.name, clean, cotangent)
    kept = expected if rules == "ragged" else expected.transpose(1, 2)
    torch.testing.assert_close(
        heads_last[~reached.to(fused.device)], kept[~reached.to(fused.device)],
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    if rules == "padding":
        for actual, wanted in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.triton_takes(lambda rules, dtype, **_: dtype == torch.float32 and not rules)
@pytest.mark.parametrize("rules", [(), ("keep", "window"), ("ragged", "blocks")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bitwise_equal(fused, rules, dtype):
    call = cases.draw(rules, tokens=300, batch=3, axes=3, dtype=dtype, device=fused.device)
    if cases.cannot_run(fused.name, call):
        pytest.skip("not for this backend")
    call = call.wanting(*ALL)
    cotangent = torch.randn(call.q.shape).to(call.q)
    before = [x.clone() for x in call.inputs]
    first, second = (cases.run(fused.name, call, cotangent) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(call.inputs, before, strict=True))


@pytest.mark.triton_takes(lambda **_: False)
@given(
    rules=st.sampled_from([(), *COMBINED]),
    batch=st.integers(1, 4),
    heads_=st.integers(1, 3),
    tokens=st.integers(1, 140),
    keys=st.integers(1, 140),
    dim=st.sampled_from(cases.HEAD_DIMS),
    axes=st.integers(0, 3),
    rope_layout=st.sampled_from(["vjepa2", "axial"]),
    indexed=st.booleans(),
    tokens_per_frame=st.integers(1, 50),
    window=st.integers(1, 4),
    layout=st.sampled_from(cases.LAYOUTS),
    dtype=st.sampled_from([torch.float32, *HALVES]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150)
def test_anything(fused, seed, **drawn):
    torch.manual_seed(seed)
    call = cases.draw(device=fused.device, **drawn)
    assume(cases.cannot_run(fused.name, call) is None)
    cases.hold(fused.name, call.wanting(*ALL), name=str(drawn))


RUNS = (((), 700), (("window",), 300), (("ragged", "blocks"), 200), (("keep",), 65))
PROGRAM = """
import sys, torch
sys.path.insert(0, ".")
from tests.attention import cases
for rules, tokens in eval(sys.argv[1]):
    torch.manual_seed(0)
    call = cases.draw(rules, tokens=tokens, batch=2, heads_=1, axes=3).wanting(True, True, True)
    cases.hold("cpu", call)
"""


def needs_the_cpu_library():
    reason = dispatch.missing("cpu", "cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)


def test_any_number_of_threads():
    """The very same bits: work is cut by its size, not by the number of threads."""
    needs_the_cpu_library()
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 4, 8):
            torch.set_num_threads(threads)
            for rules, tokens in RUNS:
                torch.manual_seed(0)
                call = cases.draw(rules, tokens=tokens, batch=2, heads_=1, axes=3).wanting(*ALL)
                out, grads = cases.run("cpu", call, torch.randn(call.q.shape))
                runs.append((threads, [out, *grads]))
    finally:
        torch.set_num_threads(before)
    for i, (_, result) in enumerate(runs):
        assert all(map(torch.equal, result, runs[i % len(RUNS)][1]))


@pytest.mark.parametrize("capacity", ["default", "avx2"])
def test_narrower_vectors(capacity):
    """What older machines run; ATEN_CPU_CAPACITY also limits torch itself."""
    needs_the_cpu_library()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(RUNS)],
        env={**os.environ, "ATEN_CPU_CAPACITY": capacity},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_op_checks_what_python_cannot_see():
    """Traced calls reach the op with values that were never looked at; it looks, with the same
    words, before it computes anything.
    """
    needs_the_cpu_library()
    op = torch.ops.vicreg_kernels.attention_forward
    q = torch.randn(1, 2, 6, 16)
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    table = Rope3d((2, 3)).table(16, q.device)

    def call(offsets=None, keys=None, lengths=None, bounds=None, index=None, grid=(1, 2, 3, 2)):
        keys = offsets if keys is None else keys
        rope = (None, None, None, [1, 1, 1, 0])
        if index is not None:
            rope = (table, index[None], index[None], list(grid))
        bounds = None if bounds is None else bounds[None]
        return op(q, q, q, "cpu", offsets, keys, lengths, None, bounds, 6, 6, 0, 0, *rope, 0.25)

    for words, arguments in (
        ("offsets: got offsets from 1", {"offsets": ints(1, 6)}),
        ("offsets: got offsets that decrease", {"offsets": ints(0, 5, 4, 6)}),
        ("offsets: got offsets up to 5", {"offsets": ints(0, 2, 5)}),
        ("key_offsets: got offsets up to 7", {"offsets": ints(0, 6), "keys": ints(0, 7)}),
        ("lengths: got 7, takes at most 6", {"lengths": ints(7)}),
        ("lengths: got -1, takes integers >= 0", {"lengths": ints(-1)}),
        ("sizes: got blocks up to token 7", {"bounds": ints(3, 7)}),
        ("sizes: got -1, takes integers >= 0", {"bounds": ints(3, 2)}),
        ("index: got places 0 to 6", {"index": ints(0, 1, 2, 3, 4, 6)}),
        ("index: got places -1 to 4", {"index": ints(-1, 1, 2, 3, 4, 4)}),
    ):
        with pytest.raises(RuntimeError, match=words):
            call(**arguments)
    call(offsets=ints(0, 0, 6), index=ints(0, 1, 2, 3, 4, 5))
