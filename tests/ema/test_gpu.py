"""Tier 7: the EMA on an NVIDIA GPU: the reference's bits, CUDA graphs, streams, far offsets.

The tests of the other tiers that take the `fused` fixture run there too.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.ema import tensors as ema_tensors
from tests.ema.tensors import (
    FEW_MIXES,
    MOMENTA,
    ROUNDINGS,
    assert_matches_reference,
    assert_same_bits,
)
from vicreg_kernels.core import dispatch
from vicreg_kernels.ema import EMA, ema_update_

pytestmark = pytest.mark.gpu

# Of target, online and shadow, for which Triton compiles kernels that read momentum and step on the
# device: float32, and of the halves bfloat16.
DEVICE_MIXES = FEW_MIXES[:5:4]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("momentum", MOMENTA)
def test_every_mix_of_dtypes(backend, momentum, rounding):
    """Against the reference on the CPU, bit by bit."""
    shapes = [(), (0,), (7,), (2, 3, 4), (513,), (130, 129)]
    settings = {"rounding": rounding, "seed": 2**62 + 8, "step": 2**33 + 5}
    value = torch.tensor(momentum, dtype=torch.float64)
    if backend == "triton":  # compiles a kernel for each mix of dtypes and dimensions
        mixes = FEW_MIXES if rounding == "nearest" else FEW_MIXES[3::2]
        lists = ema_tensors.every_dtype(shapes[2:4] + shapes[5:], mixes=mixes)
        few = ema_tensors.every_dtype(shapes, layouts=["contiguous"], mixes=DEVICE_MIXES)
    else:
        lists = few = ema_tensors.every_dtype(shapes)
    assert_matches_reference(backend, *lists, momentum, device="cuda", **settings)
    settings["step"] = torch.tensor(
        settings["step"]
    )  # with the momentum on the device, as in a graph
    assert_matches_reference(backend, *few, value, device="cuda", **settings)


def test_more_tensors_than_a_table_holds(backend):
    lists = [[torch.randn(k % 9 + 1) for k in range(2000)] for _ in range(3)]
    assert_matches_reference(backend, *lists, 0.9, device="cuda")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_graph_replays_with_another_momentum_and_step(backend, rounding):
    """Captured once; each replay reads momentum, step and the student anew. Host memory that the
    capture used is overwritten in between.
    """
    targets, onlines, copies = (
        ema_tensors.again(z, "cuda")
        for z in ema_tensors.every_dtype(
            [(70,), (3, 5), (9000,)],
            layouts=["contiguous"] if backend == "triton" else list(ema_tensors.LAYOUTS),
            mixes=DEVICE_MIXES if backend == "triton" else ema_tensors.MIXES,
        )
    )
    expected, own = ema_tensors.again(targets), ema_tensors.again(copies)
    momentum = torch.tensor(0.5, dtype=torch.float64, device="cuda")
    step = torch.tensor(0, device="cuda")

    def update(t, s):
        ema_update_(t, onlines, momentum, shadows=s, rounding=rounding, step=step, backend=backend)

    kept = ema_tensors.again(targets), ema_tensors.again(copies)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        update(targets, copies)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(targets, copies)
    for now, before in ((targets, kept[0]), (copies, kept[1])):
        torch._foreach_copy_(now, before)
    junk = [torch.full((4096,), -1, dtype=torch.int64) for _ in range(64)]
    junk += [torch.full((4096,), -1, dtype=torch.int64, device="cuda") for _ in range(64)]
    for number, value in enumerate((0.9, 0.0, 0.996, 1.0)):
        momentum.fill_(value)
        step.fill_(number)
        for online in onlines:
            online.copy_(torch.randn(online.shape))
        graph.replay()
        update(expected, own)
        assert_same_bits(targets, expected, "targets")
        assert_same_bits(copies, own, "shadows")
    del junk


def test_triton_cannot_capture_tensors_it_has_not_seen():
    reason = dispatch.missing("triton", "cuda", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    warm = [torch.randn(9, device="cuda") for _ in range(2)]
    ema_update_(warm[:1], warm[1:], 0.9, backend="triton")  # the kernel is compiled
    t, o = [torch.randn(9, device="cuda")], [torch.randn(9, device="cuda")]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="once before the capture"), torch.cuda.graph(graph):
        ema_update_(t, o, 0.9, backend="triton")


def test_a_module_in_a_graph(backend):
    """A moving schedule without a synchronisation: the step lies on the device."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16)).cuda()
    settings = {"schedule": "linear", "total_steps": 10, "shadow_dtype": torch.bfloat16}
    eager, captured = (EMA(model, 0.9, backend=backend, **settings) for _ in range(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        if backend == "cuda":
            eager.update(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if backend != "cuda":
        eager.update(model)
    captured.update(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.update(model)
    for _ in range(4):
        with torch.no_grad():
            for z in model.parameters():
                z.add_(0.1)
        eager.update(model)
        graph.replay()
    for a, b in zip(eager.state_dict().values(), captured.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_far_offsets(backend):
    """Elements beyond 2^31: 9 GB."""
    count = 2**31 + 4096
    if torch.cuda.get_device_properties(0).total_memory < 16 << 30:
        pytest.skip("needs 16 GB")
    t = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    o = torch.ones(1, dtype=torch.bfloat16, device="cuda").expand(count)
    ema_update_([t[-4096:]], [o[-4096:]], 0.5, backend=backend)
    assert t[-4096:].eq(0.5).all()
    assert t[:4096].eq(0).all()
    other = torch.ones(count, dtype=torch.bfloat16, device="cuda")
    ema_update_([t], [other], 0.5, backend=backend)
    assert t[:-4096].eq(0.5).all()
    assert t[-4096:].eq(0.75).all()


def test_a_stream_of_its_own(backend):
    t, o = torch.zeros(1 << 22, device="cuda"), torch.zeros(1 << 22, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        o.fill_(2.0)
        ema_update_([t], [o], 0.5, backend=backend)
        t.add_(1.0)
    torch.cuda.current_stream().wait_stream(side)
    assert t.eq(2.0).all()
