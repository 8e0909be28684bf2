"""Tier 7: adaptive layer norm on an NVIDIA GPU: real shapes, CUDA graphs, streams.

The tests of the other tiers that take the `fused` fixture run there too.
"""

from __future__ import annotations

import pytest
import torch

from tests.adaln.cases import MIXES, check_gate, check_norm, draw, run, same, vectors
from tests.helpers import gpu_steps
from vicreg_kernels.adaln import gated_residual, modulated_layer_norm

pytestmark = pytest.mark.gpu

# A video predictor, DiT-XL/2, one token a frame, odd ones, the longest.
REAL = [(2, 16, 196, 384), (4, 256, 1152), (64, 16, 1, 192), (3, 100, 515), (2, 33, 4096)]


# Triton's kernels are compiled for each width of a block: all in bfloat16, the least and the
# greatest in float32 too.
@pytest.mark.triton_takes(
    lambda shape, mix, **_: mix == MIXES[1] or (mix == MIXES[3] and shape in REAL[2::2])
)
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_shapes(backend, shape, mix):
    check_norm(backend, shape, mix, device="cuda")
    check_gate(backend, shape, mix, device="cuda")


def given():
    x = draw(2, 4, 196, 384, dtype=torch.bfloat16, device="cuda")
    return x, *vectors(3, x.shape, dtype=torch.bfloat16, device="cuda")


def step(backend, x, shift, scale, gate):
    def function(x, shift, scale, gate):
        normed = modulated_layer_norm(x, shift, scale, backend=backend)
        return gated_residual(x, normed, gate, backend=backend)

    return run(function, x, shift, scale, gate)


def test_two_runs_are_bitwise_equal(backend):
    leaves = given()
    first = step(backend, *leaves)
    for _ in range(3):
        torch.empty(1 << 24, device="cuda").fill_(torch.nan)  # other memory, other timing
        same(step(backend, *leaves), first)


def test_graph_replay_after_poison(backend):
    leaves = given()
    graph, results = gpu_steps.captured(lambda: step(backend, *leaves))
    for _ in range(2):
        with torch.no_grad():
            leaves[0].fill_(torch.nan)
        graph.replay()
        assert results[0].isnan().all()
        fresh = given()
        with torch.no_grad():
            for z, new in zip(leaves, fresh, strict=True):
                z.copy_(new)
        graph.replay()
        same(results, step(backend, *fresh))


def test_no_host_synchronisation(backend):
    leaves = given()
    gpu_steps.check_no_wait(lambda: step(backend, *leaves))


def test_offsets_past_two_to_the_31(backend):
    """Frames far apart in memory: the last one begins past 2^31 elements."""
    stride = ((1 << 31) // 3 + 64) // 16 * 16
    if torch.cuda.mem_get_info()[0] < 3 * stride * 4:
        pytest.skip("needs about 9 GB of free memory")
    torch.utils.deterministic.fill_uninitialized_memory = False  # the base is not read
    base = torch.empty(stride * 4, dtype=torch.bfloat16, device="cuda")
    far = base.as_strided((4, 2, 64), (stride, 64, 1))
    near = draw(4, 2, 64, dtype=torch.bfloat16, grad=False, device="cuda")
    far.copy_(near)
    shift, scale = vectors(2, near.shape, dtype=torch.bfloat16, device="cuda")
    same(*([modulated_layer_norm(z, shift, scale, backend=backend).detach()] for z in (far, near)))


def test_compiled_full_graph(backend):
    leaves = given()
    torch.compiler.reset()
    compiled = torch.compile(lambda *z: modulated_layer_norm(*z, backend=backend), fullgraph=True)
    results = run(compiled, *leaves[:3])
    same(results, run(lambda *z: modulated_layer_norm(*z, backend=backend), *leaves[:3]))
