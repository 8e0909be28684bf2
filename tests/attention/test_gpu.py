"""Tier 7: masked attention and rotary position on an NVIDIA GPU: real shapes, rules, CUDA graphs,
streams, far offsets, memory.

The tests of the other tiers that take the `fused` fixture run there too.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.attention import cases
from tests.attention.cases import LAYOUTS, RULES, Call, draw, hold
from tests.helpers import gpu_steps
from vicreg_kernels.attention import Ragged, Rope3d, apply_rope, masked_attention
from vicreg_kernels.core import dispatch

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HALVES = (torch.bfloat16, torch.float16)
# Published models: heads, head dim, tokens of a sample (least, most), axes of the rotary position.
REAL = {
    "ijepa_vit_h_context": (16, 80, (69, 110), 2),
    "ijepa_vit_h_predictor": (12, 32, (113, 154), 2),
    "ijepa_vit_h_teacher": (16, 80, (256, 256), 2),
    "ijepa_vit_g_context": (16, 88, (58, 94), 2),
    "vjepa_vit_l_context": (16, 64, (111, 256), 3),
    "vjepa2_vit_g_context": (22, 64, (120, 381), 3),  # past 256: not for the cuda backend
}


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = dispatch.missing(request.param, DEVICE, torch.bfloat16)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def real(name: str, samples: int, dtype: torch.dtype) -> Call:
    """Packed samples whose lengths lie between a model's least and most, both of them included."""
    heads, dim, (least, most), axes = REAL[name]
    lengths = torch.randint(least, most + 1, (samples,)).tolist()
    lengths[0], lengths[-1] = least, most
    call = draw(["ragged"], lengths=lengths, heads_=heads, dim=dim, axes=axes, indexed=True,
                layout="fused_qkv", dtype=dtype, device=DEVICE)  # fmt: skip
    return call.wanting(True, True, True)


def skip_what_cannot_run(backend: str, call: Call) -> None:
    reason = cases.cannot_run(backend, call)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def results(backend: str, call: Call, cotangent: Tensor | None = None) -> tuple[Tensor, ...]:
    """The output, then all gradients."""
    cotangent = torch.ones_like(call.q) if cotangent is None else cotangent
    out, grads = cases.run(backend, call.wanting(True, True, True), cotangent)
    return (out, *grads)  # type: ignore[return-value]


@pytest.mark.triton_takes(
    lambda name, dtype, **_: dtype == torch.bfloat16 and name != "ijepa_vit_h_teacher"
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", REAL)
def test_real_shapes_match_the_reference(backend, name, dtype):
    call = real(name, 5, dtype)  # the reference makes a matrix of all tokens by all tokens
    skip_what_cannot_run(backend, call)
    hold(backend, call, name=name)


@pytest.mark.parametrize("name", ["ijepa_vit_h_context", "vjepa_vit_l_context"])
def test_a_whole_batch_gives_what_its_samples_give_alone(backend, name):
    call = real(name, 128, torch.bfloat16)
    cotangent = torch.randn(call.q.shape).to(call.q)
    whole = results(backend, call, cotangent)
    offsets = call.mask.tensors.own["offsets"].tolist()
    for sample in (0, 63, 127):
        own = slice(offsets[sample], offsets[sample + 1])
        rope = Rope3d(call.rope.grid[3 - call.rope.axes :], call.rope.index[own])
        alone = cases.replace(
            call,
            q=call.q[own], k=call.k[own], v=call.v[own], rope=rope,
            mask=cases.Ragged([0, own.stop - own.start]),
        )  # fmt: skip
        for all_, one in zip(whole, results(backend, alone, cotangent[own]), strict=True):
            torch.testing.assert_close(all_[own], one, rtol=2e-2, atol=2e-3)
            if backend == "cuda":  # a block knows nothing of the other samples
                assert torch.equal(all_[own], one)


@pytest.mark.parametrize(("dim", "rules"), [(80, ["window"]), (104, ["window", "blocks"])])
def test_backends_agree(dim, rules):
    for name in ("cuda", "triton"):
        if dispatch.missing(name, DEVICE, torch.bfloat16) is not None:
            pytest.skip(f"needs {name}")
    call = draw(rules, tokens=200, dim=dim, axes=3, dtype=torch.bfloat16, device=DEVICE)
    for a, b in zip(results("cuda", call), results("triton", call), strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < 2e-2


COMBINED = [("keep", "window"), ("lengths", "blocks"), ("ragged", "frames", "blocks")]


@pytest.mark.triton_takes(
    lambda rules, dtype, **_: dtype == (torch.float16 if len(rules) > 2 else torch.bfloat16)
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rules", [(), *((rule,) for rule in RULES), *COMBINED], ids="-".join)
def test_rules_match_the_reference(backend, rules, dtype):
    sizes = ((80, 110, 110), (64, 200, 256), (128, 256, 256), (40, 3, 70))
    if backend == "triton":  # compiles all for each head dim: test_backends_agree has another
        sizes = sizes[:1]
    for dim, tokens, keys in sizes:
        call = draw(rules, batch=4, tokens=tokens, keys=keys, dim=dim, axes=3, tokens_per_frame=24,
                    dtype=dtype, device=DEVICE)  # fmt: skip
        hold(backend, call.wanting(True, True, True))


# Triton reads what begins at no aligned address as it does strided heads; test_strides has such.
@pytest.mark.triton_takes(lambda layout, **_: layout != "sliced")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_match_the_reference(backend, layout):
    for rules in ((), ("ragged",)):
        if backend == "triton" and rules and layout != "fused_qkv":  # compiles all for each layout
            continue
        call = draw(
            rules, tokens=90, dim=80, layout=layout, axes=3, dtype=torch.bfloat16, device=DEVICE
        )
        hold(backend, call.wanting(True, True, True))


# Of what is left out here, Triton's kernels are launched by: float32 and float16: test_apply_rope.
@pytest.mark.triton_takes(lambda dtype, **_: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_rotation_matches_the_reference(backend, dtype):
    rope = Rope3d((16, 16, 16))
    for layout in LAYOUTS:
        x = cases.heads(2, 16, 1568, 80, layout=layout, dtype=dtype, device=DEVICE)
        rotated = apply_rope(x, rope, backend=backend).double()
        truth = apply_rope(x.double(), rope, backend="reference")
        assert (rotated - truth).abs().max() <= torch.finfo(dtype).eps * truth.abs().max()


def typical(dtype: torch.dtype = torch.bfloat16) -> Call:
    """Packed, two passes over the keys in the longest sample, rotated, with a rule."""
    return draw(["ragged", "window"], lengths=[69, 0, 110, 200], heads_=16, dim=80, axes=3,
                tokens_per_frame=16, dtype=dtype, device=DEVICE)  # fmt: skip


@pytest.mark.triton_takes(lambda dtype, **_: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_graph_replay_after_poison(backend, dtype):
    """A graph replayed on NaN leaves NaN in every buffer of its pool; whatever a later replay does
    not write anew shows."""
    call = typical(dtype)
    buffers = [x.clone() for x in call.inputs]
    cotangent = torch.randn(call.q.shape).to(call.q)
    inside = cases.replace(call, q=buffers[0], k=buffers[1], v=buffers[2])
    graph, captured = gpu_steps.captured(lambda: results(backend, inside, cotangent))
    for _ in range(2):
        for x in buffers:
            x.fill_(torch.nan)
        graph.replay()
        assert all(x.isnan().all() for x in captured)
        fresh = [torch.randn(x.shape).to(x) for x in buffers]
        for x, new in zip(buffers, fresh, strict=True):
            x.copy_(new)
        graph.replay()
        eager = cases.replace(call, q=fresh[0], k=fresh[1], v=fresh[2])
        for once, wanted in zip(captured, results(backend, eager, cotangent), strict=True):
            assert torch.equal(once, wanted)


def test_two_runs_are_bitwise_equal(backend):
    call = typical()
    cotangent = torch.randn(call.q.shape).to(call.q)
    first = results(backend, call, cotangent)
    for _ in range(3):
        torch.empty(1 << 24, device=DEVICE).fill_(torch.nan)  # other memory, other timing
        second = results(backend, call, cotangent)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_host_synchronisation(backend):
    call = typical()
    results(backend, call)  # loads and compiles kernels, brings the rules to the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome = results(backend, call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in outcome)


def test_runs_on_the_current_stream(backend):
    """The inputs are written on a side stream behind slow work: a kernel on another stream would
    read them too early."""
    call = typical()
    wanted = results(backend, call)
    late = cases.replace(call, **{n: torch.zeros_like(getattr(call, n)) for n in ("q", "k", "v")})
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for to, source in zip(late.inputs, call.inputs, strict=True):
            to.copy_(source)
        outcome = results(backend, late)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outcome, wanted, strict=True))


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_offsets_past_two_to_the_31(backend, which):
    """Tokens far apart in memory: the last one begins past 2^31 elements."""
    tokens, dim = 5, 64
    stride = (1 << 31) // (tokens - 1) + 64
    if torch.cuda.mem_get_info()[0] < 3 * stride * tokens:
        pytest.skip("needs about 8 GB of free memory")
    torch.utils.deterministic.fill_uninitialized_memory = False  # the base is not read
    call = draw(
        batch=1, heads_=1, tokens=tokens, dim=dim, axes=3, dtype=torch.bfloat16, device=DEVICE
    )
    base = torch.empty(stride * tokens, dtype=torch.bfloat16, device=DEVICE)
    # A stride past 2^31 is another kernel in Triton: of v alone.
    outer = stride * tokens if which == "v" else stride
    far = base.as_strided((1, 1, tokens, dim), (outer, outer, stride, 1))
    assert far[0, 0, -1].storage_offset() >= 1 << 31
    far.copy_(getattr(call, which))
    cotangent = torch.randn(call.q.shape).to(call.q)
    wanted = results(backend, call, cotangent)
    outcome = results(backend, cases.replace(call, **{which: far}), cotangent)
    assert all(torch.equal(a, b) for a, b in zip(outcome, wanted, strict=True))
    rope = call.rope
    turned = [apply_rope(x, rope, backend=backend) for x in (far, getattr(call, which))]
    assert torch.equal(*turned)


def test_peak_memory(backend):
    """Output, three gradients and at most one float32 tensor like the queries, no T x T."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    call = draw(["frames"], batch=4, heads_=4, tokens=1280, dim=80, axes=3, tokens_per_frame=80,
                dtype=torch.bfloat16, device=DEVICE)  # fmt: skip
    cotangent = torch.ones_like(call.q)
    results(backend, call, cotangent)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = results(backend, call, cotangent)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    own = call.q.numel() * call.q.element_size()  # a T x T matrix of bfloat16 is 16 of these
    rows = 2 * 4 * call.q.numel() // call.q.shape[-1]
    assert peak <= 6 * own + rows + (1 << 20)


@pytest.mark.parametrize("rules", [(), ("ragged", "window")], ids=str)
def test_compiled_full_graph(backend, rules):
    call = draw(rules, heads_=16, tokens=100, dim=80, axes=3, dtype=torch.bfloat16, device=DEVICE)
    call = call.wanting(True, True, True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, backend=backend, **call.settings)

    torch.compiler.reset()
    cotangent = torch.randn(call.q.shape).to(call.q)
    out = torch.compile(attend, fullgraph=True)(*call.inputs)
    outcome = (out.detach(), *torch.autograd.grad(out, call.inputs, cotangent))
    for a, b in zip(outcome, results(backend, call, cotangent), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


def test_debug_mode_refuses_offsets_and_places_on_the_device(monkeypatch):
    monkeypatch.setattr(dispatch, "DEBUG", True)
    with pytest.raises(ValueError, match="offsets: got offsets that decrease"):
        Ragged(torch.tensor([0, 5, 3], device=DEVICE), max_length=9)
    with pytest.raises(ValueError, match="index: got places 0 to 6"):
        Rope3d((2, 3), torch.tensor([0, 6], device=DEVICE))
