"""Memory of forward and backward: at most 4 N D + 2 min(N, D)^2 elements over both views.

Counted from outside the inputs and with the two gradients, N D each. Three witnesses: the running
peak of everything torch's allocator handed out (C++ scratch included, as far as it comes from
there), the process's resident peak (which sees what does not), and the shapes of all allocations.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vicreg_kernels import variance_covariance, vicreg_loss, vicreg_terms

ELEMENT = 4  # bytes of float32
# Moments, deflated columns, partial sums: O(N + D) elements.
COLUMNS = 64
CONSTANT = 1 << 16

SHAPES = [(64, 2048), (256, 1024), (100, 101), (256, 256), (1024, 256), (2048, 64)]


def limit(rows: int, dim: int) -> int:
    """Bytes."""
    side = min(rows, dim)
    return ELEMENT * (4 * rows * dim + 2 * side**2 + COLUMNS * (rows + dim)) + CONSTANT


def allocations(prof: profile) -> list[int]:
    """Bytes of each allocation (positive) and release (negative), in order."""
    events = prof.profiler.kineto_results.events()
    memory = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return [size for _, size in sorted(memory, key=lambda pair: pair[0])]


def peak(sizes: list[int]) -> int:
    held, highest = 0, 0
    for size in sizes:
        held += size
        highest = max(highest, held)
    return highest


def traced(function, *inputs) -> list[int]:
    """Allocations of one forward and backward, after a first that is not counted."""

    def run():
        return torch.autograd.grad(function(*inputs), inputs)

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        gradients = run()
    assert all(g.shape == z.shape for g, z in zip(gradients, inputs, strict=True))
    return allocations(prof)


@pytest.fixture
def cpu(fused):
    if fused.device != "cpu":
        pytest.skip("the CPU allocator's count; CUDA has its own test")
    return fused


def two_views(shape, device="cpu"):
    return [torch.randn(shape, device=device, requires_grad=True) for _ in range(2)]


def test_the_count_sees_a_known_peak():
    """Three live tensors of 1 MiB, after a fourth was released."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        torch.ones(1 << 18)
        kept = [torch.ones(1 << 18) for _ in range(3)]
    assert peak(allocations(prof)) == 3 * (1 << 20)
    assert len(kept) == 3


@pytest.mark.parametrize("shape", SHAPES)
def test_peak_of_the_loss(cpu, shape):
    sizes = traced(lambda x, y: vicreg_loss(x, y, backend=cpu.name), *two_views(shape))
    assert 2 * ELEMENT * shape[0] * shape[1] <= peak(sizes) <= limit(*shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_peak_of_transposed_views(cpu, shape):
    """Strided inputs earn no copy either."""
    views = [z.detach().t().contiguous().t().requires_grad_() for z in two_views(shape)]
    sizes = traced(lambda x, y: sum(vicreg_terms(x, y, backend=cpu.name)), *views)
    assert peak(sizes) <= limit(*shape)


@pytest.mark.parametrize("shape", [(7, 64, 96), (7, 96, 64)])
def test_peak_of_groups(cpu, shape):
    """One view of G groups: half of the limit, per group."""
    groups, rows, dim = shape
    (z,) = [torch.randn(shape, requires_grad=True)]
    sizes = traced(lambda z: sum(variance_covariance(z, backend=cpu.name)), z)
    assert peak(sizes) <= groups * limit(rows, dim) // 2 + CONSTANT


@pytest.mark.parametrize("shape", [(64, 2048), (256, 1024), (100, 400)])
def test_no_square_of_the_longer_side(cpu, shape):
    """When N < D nothing of D x D elements is ever allocated, by C++ or by autograd."""
    rows, dim = shape
    sizes = traced(lambda x, y: vicreg_loss(x, y, backend=cpu.name), *two_views(shape))
    assert max(sizes) < ELEMENT * dim * dim
    assert max(sizes) <= ELEMENT * 2 * max(rows * dim, rows * rows) + CONSTANT


def test_the_reference_breaks_the_limit():
    """The measure tells the two formulas apart."""
    shape = (64, 2048)
    sizes = traced(lambda x, y: vicreg_loss(x, y, backend="reference"), *two_views(shape))
    assert peak(sizes) > limit(*shape)
    assert max(sizes) >= ELEMENT * shape[1] ** 2


RESIDENT = """
import re, sys, torch
from vicreg_kernels import vicreg_loss

def run(x, y):
    torch.autograd.grad(vicreg_loss(x, y, backend=sys.argv[1]), (x, y))

def resident():
    # Not ru_maxrss, which starts at that of the process this one was forked from.
    status = open("/proc/self/status").read()
    return int(re.search("VmHWM:\\s+(\\d+)", status)[1]) * 1024

rows, dim = int(sys.argv[2]), int(sys.argv[3])
for shape in [(40, 60), (60, 40)]:
    run(*(torch.randn(shape, requires_grad=True) for _ in range(2)))
# Held to the end, so that what the imports once used does not hide part of the peak.
ballast = torch.ones(64 << 20)
views = [torch.randn(rows, dim, requires_grad=True) for _ in range(2)]
before = resident()
run(*views)
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("shape", [(256, 8192), (16384, 256)])
def test_resident_peak(cpu, shape):
    """What the process holds, however it was allocated; 32 MiB for the vendor product's packing."""
    command = [sys.executable, "-c", RESIDENT, cpu.name, *map(str, shape)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 2 * ELEMENT * shape[0] * shape[1] <= grown <= limit(*shape) + (32 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 2048), (512, 8192), (2048, 512), (6528, 512)])
def test_peak_on_cuda(fused, shape):
    if fused.device != "cuda":
        pytest.skip("CUDA's own count")
    views = two_views(shape, "cuda")

    def run():
        return torch.autograd.grad(vicreg_loss(*views, backend=fused.name), views)

    run()  # the vendor product's workspace stays
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    assert torch.cuda.max_memory_allocated() - before <= limit(*shape)
