"""Tier 7: the SIGReg op on an NVIDIA GPU: real shapes, CUDA graphs, streams, far offsets, memory.

The tests of the other tiers that take the `fused` fixture run there too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers.shapes import randn
from tests.sigreg import cases as sigreg_cases
from tests.sigreg.cases import KNOTS, check
from vicreg_kernels.core import loader
from vicreg_kernels.sigreg import contract, sigreg_directions, sigreg_loss

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, D, M, knots
REAL = [(512, 192, 1024, 17), (2048, 512, 1024, 17), (2048, 512, 4096, 41)]
SMALL = [(130, 67, 70), (300, 129, 33)]  # off the tiles


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, dtype=dtype, device="cuda").requires_grad_()


def gradients(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    value = function(z)
    return value.detach(), *torch.autograd.grad(value, z)


@pytest.mark.triton_takes(lambda shape, dtype, **_: dtype == torch.bfloat16 or shape == REAL[1])
@pytest.mark.gpu_memory
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", REAL, ids=lambda s: "x".join(map(str, s)))
def test_real_shapes_match_the_reference(backend, shape, dtype):
    rows, dim, slices, knots = shape
    if torch.cuda.mem_get_info()[0] < 48 * rows * slices * knots:
        pytest.skip("the float64 reference holds every angle")
    check(backend, draw(rows, dim, dtype=dtype), slices, knots=knots)


# Of what is left out here, Triton's kernels are launched by: float16: test_real_shapes.
@pytest.mark.triton_takes(lambda dtype, **_: dtype != torch.float16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_and_variants(backend, dtype):
    for convention in ("lewm", "eb_jepa", "stable_pretraining"):
        check(backend, draw(16, 128, 192, dtype=dtype), 256, convention=convention)


@pytest.mark.parametrize("knots", KNOTS)
def test_every_kind_of_knots(backend, knots):
    kernels = loader.load("sigreg", contract.Kernels, backend)
    z, directions = 17.0 * randn(2, 300, 30, device="cuda"), sigreg_cases.unit(30, 70).cuda()
    sigreg_cases.check_sums(kernels, z, directions, KNOTS[knots])


def test_directions(backend):
    kernels = loader.load("sigreg", contract.Kernels, backend)
    for dim, slices, seed, step in ((512, 1024, 0, 0), (67, 33, -3, 2**40 + 5), (1, 1, 2**62, 7)):
        sigreg_cases.check_directions(kernels, dim, slices, seed, step, "cuda")


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_graph_replay_after_poison(backend, shape):
    """A graph replayed on NaN leaves NaN in every buffer of its pool; whatever a later replay does
    not write anew shows. The step is a tensor: every replay draws other directions."""
    rows, dim, slices = shape
    step = torch.zeros((), dtype=torch.int64, device="cuda")

    def loss(z: Tensor) -> Tensor:
        return sigreg_loss(z, slices=slices, step=step, seed=3, backend=backend)

    z = draw(2, rows, dim)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients(loss, z)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = gradients(loss, z)
        step += 1
    for expected in (0, 1):
        saved = step.clone()
        with torch.no_grad():
            z.fill_(torch.nan)
        graph.replay()
        assert all(result.isnan().all() for result in results)
        step.copy_(saved)
        fresh = randn(2, rows, dim, device="cuda")
        with torch.no_grad():
            z.copy_(fresh)
        graph.replay()
        assert step.item() == expected + 1
        replayed = [result.clone() for result in results]
        step.copy_(saved)
        for once, wanted in zip(replayed, gradients(loss, z), strict=True):
            # a captured vendor product may take another algorithm than an eager one
            torch.testing.assert_close(once, wanted, rtol=1e-4, atol=1e-6)
        step.fill_(expected + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_two_runs_are_bitwise_equal_and_wait_for_nothing(backend, shape, dtype):
    rows, dim, slices = shape
    z, step = draw(rows, dim, dtype=dtype), torch.ones((), dtype=torch.int64, device="cuda")

    def loss(z: Tensor) -> Tensor:
        return sigreg_loss(z, slices=slices, step=step, backend=backend)

    first = gradients(loss, z)  # loads and compiles kernels
    torch.empty(1 << 24, device="cuda").fill_(torch.nan)  # other memory, other timing
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = gradients(loss, z)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_runs_on_the_current_stream(backend):
    """The input is written on a side stream behind slow work: a kernel on another stream would read
    it too early."""
    source = draw(300, 129)

    def loss(z: Tensor) -> Tensor:
        return sigreg_loss(z, slices=256, backend=backend)

    wanted = gradients(loss, source)
    z = torch.zeros_like(source, requires_grad=True)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            z.copy_(source)
        actual = gradients(loss, z)
    side.synchronize()
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_offsets_past_two_to_the_31(backend):
    """Rows far apart in memory: the last one begins past 2^31 elements."""
    rows, dim = 5, 96
    stride = (1 << 31) // (rows - 1) + 64
    if torch.cuda.mem_get_info()[0] < 3 * stride * rows:
        pytest.skip("needs about 8 GB of free memory")
    torch.utils.deterministic.fill_uninitialized_memory = False  # the base is not read
    base = torch.empty(stride * rows, dtype=torch.bfloat16, device="cuda")
    z = base.as_strided((rows, dim), (stride, 1))
    near = draw(rows, dim, dtype=torch.bfloat16)
    z.copy_(near.detach())
    runs = [
        gradients(lambda z: sigreg_loss(z, slices=64, backend=backend), each)
        for each in (z.requires_grad_(), near)
    ]
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peak_memory(backend, dtype):
    """The projections, a scratch no larger, the gradient, and the sums in parts: nothing of size
    N M K, which here would be 134 MB."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    rows, dim, slices, knots = 2048, 512, 1024, 16
    z = draw(rows, dim, dtype=dtype)
    directions = sigreg_cases.unit(dim, slices, dtype, "cuda")

    def loss(z: Tensor) -> Tensor:
        return sigreg_loss(z, directions=directions, backend=backend)

    gradients(loss, z)  # the vendor's workspace stays
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = gradients(loss, z)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    sums = 8 * slices * knots
    assert peak <= 8 * rows * slices + 4 * rows * dim + 20 * sums + (1 << 20)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_compiled_full_graph(backend, shape):
    rows, dim, slices = shape
    z = draw(rows, dim)

    def loss(z: Tensor) -> Tensor:
        return sigreg_loss(z, slices=slices, step=5, backend=backend)

    torch.compiler.reset()
    actual = gradients(torch.compile(loss, fullgraph=True), z)
    for a, b in zip(actual, gradients(loss, z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_backends_draw_the_same_directions(backend):
    where = torch.device("cuda", torch.cuda.current_device())
    drawn = sigreg_directions(192, 300, step=4, seed=9, device=where, backend=backend)
    wanted = sigreg_directions(192, 300, step=4, seed=9, device=where, backend="reference")
    torch.testing.assert_close(drawn, wanted, rtol=1e-6, atol=5e-7)
