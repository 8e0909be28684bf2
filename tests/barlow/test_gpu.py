"""Tier 7: the Barlow Twins op on an NVIDIA GPU: real shapes, CUDA graphs, far offsets, memory.

The tests of the other tiers that take the `fused` fixture run there too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import gpu_steps
from tests.helpers.shapes import randn
from tests.helpers.tolerances import assert_matches_reference
from vicreg_kernels.barlow import barlow_twins_loss

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REAL = [
    (64, 8192),
    (256, 2048),
    (256, 8192),
    (1024, 2048),
    (2048, 8192),
    (2048, 512),
    (16384, 384),
]
# Of these shapes Triton compiles kernels for float32 too; for float16 in the tests of halves.
SOME = [(256, 8192), (2048, 512)]
BOTH_SIDES = [(256, 8192), (130, 515), (2048, 512), (515, 130)]


def correlated(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = randn(*shape) * torch.linspace(0.5, 1.5, shape[-1])
    y = x + 0.3 * randn(*shape)
    return tuple(z.to("cuda", dtype).requires_grad_() for z in (x, y))  # type: ignore[return-value]


def gradients(backend: str, *views: Tensor) -> tuple[Tensor, ...]:
    """The loss of the views, then its gradients."""
    value = barlow_twins_loss(*views, backend=backend)
    return (value.detach(), *torch.autograd.grad(value, views))


@pytest.mark.triton_takes(
    lambda shape, dtype, **_: (
        dtype == torch.bfloat16 or (dtype == torch.float32 and shape in SOME)
    )
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", REAL, ids=lambda s: "x".join(map(str, s)))
def test_real_shapes_match_the_reference(backend, shape, dtype):
    x, y = correlated(*shape, dtype=dtype)
    assert_matches_reference(barlow_twins_loss, backend, x, y, name=f"{shape}")


# Of what is left out here, Triton's kernels are launched by: bfloat16, odd: test_barlow_cpu,
# test_nan_and_inf_spread_as_in_the_reference.
@pytest.mark.triton_takes(lambda shape, dtype, **_: dtype == torch.float32 or shape in SOME)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", BOTH_SIDES, ids=str)
def test_graph_replay_after_poison(backend, shape, dtype):
    gpu_steps.check_replays(
        lambda x, y: gradients(backend, x, y),
        lambda: correlated(*shape, dtype=dtype),
    )


@pytest.mark.parametrize("shape", BOTH_SIDES, ids=str)
def test_two_runs_are_bitwise_equal(backend, shape):
    x, y = correlated(*shape, dtype=torch.float32)
    first = gradients(backend, x, y)
    for _ in range(3):
        torch.empty(1 << 24, device="cuda").fill_(torch.nan)  # other memory, other timing
        second = gradients(backend, x, y)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", BOTH_SIDES, ids=str)
def test_no_host_synchronisation_and_on_the_current_stream(backend, shape):
    """The inputs are written on a side stream behind slow work: a kernel on another stream would
    read them too early."""
    source = correlated(*shape, dtype=torch.float32)
    wanted = gradients(backend, *source)  # loads and compiles kernels
    x, y = (torch.zeros(shape, device="cuda", requires_grad=True) for _ in range(2))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            with torch.no_grad():
                x.copy_(source[0])
                y.copy_(source[1])
            actual = gradients(backend, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.synchronize()
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("shape", [(16, 96), (96, 16)], ids=str)
def test_offsets_past_two_to_the_31(backend, shape):
    """Rows far apart in memory: the last one begins past 2^31 elements."""
    rows, dim = shape
    stride = ((1 << 31) // (rows - 1) + 64) // 16 * 16  # as near rows: of one Triton kernel
    if torch.cuda.mem_get_info()[0] < 3 * stride * rows:
        pytest.skip("needs about 7 GB of free memory")
    torch.utils.deterministic.fill_uninitialized_memory = False  # the base is not read
    base = torch.empty(stride * rows, dtype=torch.bfloat16, device="cuda")
    z = base.as_strided((rows, dim), (stride, 1))
    assert z[-1].storage_offset() >= 1 << 31
    near, y = (randn(rows, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    z.copy_(near)
    far = gradients(backend, z.requires_grad_(), y.requires_grad_())
    wanted = gradients(backend, near.requires_grad_(), y.requires_grad_())
    for a, b in zip(far, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def most_memory(backend: str, rows: int, dim: int, element: int) -> int:
    """Bytes: products and gradients; cuda: the standardised views; half inputs: products before
    they are rounded, and cuda's rounded squares; a few vectors of statistics.
    """
    side = min(rows, dim)
    area = side * side * (2 if rows < dim else 1)
    vectors = 4 * 64 * (rows + dim) + (1 << 20)
    total = 4 * area + 2 * element * rows * dim + vectors
    if backend == "cuda":
        total += 2 * element * rows * dim
    if element == 2:
        total += 8 * rows * dim + (2 * area if backend == "cuda" else 0)
    if backend == "triton":
        total += 2 * element * rows * dim  # the parts of a split product, freed before the backward
    return total


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(256, 8192), (1024, 2048), (2048, 512)], ids=str)
def test_peak_memory(backend, shape, dtype):
    torch.utils.deterministic.fill_uninitialized_memory = False
    x, y = correlated(*shape, dtype=dtype)
    gradients(backend, x, y)  # the vendor's workspace stays
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = gradients(backend, x, y)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    assert peak <= most_memory(backend, *shape, x.element_size())


@pytest.mark.parametrize("shape", [(130, 515), (515, 130)], ids=str)
def test_compiled_full_graph(backend, shape):
    x, y = correlated(*shape, dtype=torch.float32)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return barlow_twins_loss(x, y, backend=backend)

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        value = function(x, y)
        return (value.detach(), *torch.autograd.grad(value, (x, y)))

    torch.compiler.reset()
    for a, b in zip(run(torch.compile(loss, fullgraph=True)), run(loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
