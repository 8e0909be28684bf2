"""Tier 7: the VICReg op on an NVIDIA GPU: real shapes, CUDA graphs, streams, far offsets, memory.

The tests of the other tiers that take the `fused` fixture run there too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.helpers import gpu_steps
from tests.helpers.shapes import randn
from tests.helpers.tolerances import assert_matches_reference
from vicreg_kernels import variance_covariance, vicreg_loss
from vicreg_kernels.core import dispatch

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REAL = [
    (64, 8192),
    (256, 2048),
    (256, 8192),
    (512, 8192),
    (1024, 2048),
    (2048, 8192),
    (2048, 512),
    (6528, 512),
    (16384, 384),
]
# Of these shapes Triton compiles kernels for float32 too; for float16 in the tests of halves.
SOME = [(256, 8192), (2048, 512)]
BOTH_SIDES = [(256, 8192), (130, 515), (2048, 512), (515, 130)]


def correlated(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two views with standard deviations on both sides of the margin."""
    x = randn(*shape) * torch.linspace(0.5, 1.5, shape[-1])
    y = x + 0.3 * randn(*shape)
    return tuple(z.to("cuda", dtype).requires_grad_() for z in (x, y))  # type: ignore[return-value]


def gradients(function: Callable[..., Tensor], *views: Tensor) -> tuple[Tensor, ...]:
    """The value of function(*views), then its gradients."""
    value = function(*views)
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
    assert_matches_reference(vicreg_loss, backend, x, y, name=f"{shape}")


@pytest.mark.parametrize("shape", [*REAL, *BOTH_SIDES[1::2]], ids=str)
def test_tf32x3_matches_the_reference(shape):
    """At float32's tolerances, also where torch allows TF32, and twice the same bits."""
    if dispatch.missing("cuda", "cuda", torch.float32) is not None:
        pytest.skip("needs the CUDA backend")
    x, y = correlated(*shape, dtype=torch.float32)
    loss = partial(vicreg_loss, precision="tf32x3")
    assert_matches_reference(loss, "cuda", x, y, name=f"{shape}")
    first = gradients(lambda *v: loss(*v, backend="cuda"), x, y)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        second = gradients(lambda *v: loss(*v, backend="cuda"), x, y)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.triton_takes(lambda dtype, **_: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_match_the_reference(backend, dtype):
    z, _ = correlated(49, 512, 512, dtype=dtype)
    assert_matches_reference(variance_covariance, backend, z, cotangents=(25.0, 1.0))


# Of what is left out here, Triton's kernels are launched by: bfloat16, odd: test_vicreg_cpu,
# test_nan_and_inf_spread_as_in_the_reference.
@pytest.mark.triton_takes(lambda shape, dtype, **_: dtype == torch.float32 or shape in SOME)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", BOTH_SIDES, ids=str)
def test_graph_replay_after_poison(backend, shape, dtype):
    gpu_steps.check_replays(
        lambda x, y: gradients(lambda *v: vicreg_loss(*v, backend=backend), x, y),
        lambda: correlated(*shape, dtype=dtype),
    )


@pytest.mark.parametrize("shape", BOTH_SIDES, ids=str)
def test_two_runs_are_bitwise_equal(backend, shape):
    x, y = correlated(*shape, dtype=torch.float32)
    first = gradients(lambda *v: vicreg_loss(*v, backend=backend), x, y)
    for _ in range(3):
        torch.empty(1 << 24, device="cuda").fill_(torch.nan)  # other memory, other timing
        second = gradients(lambda *v: vicreg_loss(*v, backend=backend), x, y)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", BOTH_SIDES, ids=str)
def test_no_host_synchronisation(backend, shape):
    x, y = correlated(*shape, dtype=torch.float32)
    gradients(lambda *v: vicreg_loss(*v, backend=backend), x, y)  # loads and compiles kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = gradients(lambda *v: vicreg_loss(*v, backend=backend), x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(result.isfinite().all() for result in results)


def test_runs_on_the_current_stream(backend):
    """The inputs are written on a side stream behind slow work: a kernel on another stream would
    read them too early."""
    shape = (256, 2048)
    source = correlated(*shape, dtype=torch.float32)
    wanted = gradients(lambda *v: vicreg_loss(*v, backend=backend), *source)
    x, y = (torch.zeros(shape, device="cuda", requires_grad=True) for _ in range(2))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            x.copy_(source[0])
            y.copy_(source[1])
        actual = gradients(lambda *v: vicreg_loss(*v, backend=backend), x, y)
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
    far = gradients(
        lambda *v: vicreg_loss(*v, backend=backend), z.requires_grad_(), y.requires_grad_()
    )
    wanted = gradients(
        lambda *v: vicreg_loss(*v, backend=backend), near.requires_grad_(), y.requires_grad_()
    )
    for a, b in zip(far, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("shape", [(256, 8192), (1024, 2048), (2048, 512)], ids=str)
def test_peak_memory(backend, shape):
    """At most 4 N D + 2 min(N, D)^2 elements over both views, gradients included, and a few
    vectors of statistics."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    rows, dim = shape
    x, y = correlated(*shape, dtype=torch.float32)
    gradients(lambda *v: vicreg_loss(*v, backend=backend), x, y)  # the vendor's workspace stays
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = gradients(lambda *v: vicreg_loss(*v, backend=backend), x, y)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    vectors = 64 * (rows + dim) + (1 << 18)
    assert peak <= 4 * (4 * rows * dim + 2 * min(rows, dim) ** 2 + vectors)


@pytest.mark.parametrize("shape", [(130, 515), (515, 130)], ids=str)
def test_compiled_full_graph(backend, shape):
    x, y = correlated(*shape, dtype=torch.float32)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return vicreg_loss(x, y, backend=backend)

    torch.compiler.reset()
    actual = gradients(torch.compile(loss, fullgraph=True), x, y)
    for a, b in zip(actual, gradients(loss, x, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
