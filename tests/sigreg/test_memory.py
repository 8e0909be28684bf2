"""Memory of SIGReg's forward and backward: beyond z and its gradient, the projections N M, the
2 K M sums and the 2 K M coefficients, the directions, and what a thread works on.
"""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.vicreg.test_memory import ELEMENT, allocations, peak
from vicreg_kernels.sigreg import sigreg_directions, sigreg_loss

CONSTANT = 1 << 16


def limit(groups: int, rows: int, dim: int, slices: int, knots: int) -> int:
    """Bytes: the gradient, the projections, the sums and coefficients, drawn directions, and a
    scratch as large as the projections.
    """
    sums = 2 * groups * knots * slices
    return ELEMENT * (groups * rows * (dim + 2 * slices) + 2 * sums + 2 * dim * slices) + CONSTANT


def traced(function, z) -> list[int]:
    def run():
        return torch.autograd.grad(function(z), z)

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    return allocations(prof)


@pytest.fixture
def cpu(fused):
    if fused.device != "cpu":
        pytest.skip("the CPU allocator's count")
    return fused


SHAPES = [(1, 512, 64, 256), (4, 64, 32, 128), (1, 100, 200, 77), (1, 1024, 16, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_peak(cpu, shape, dtype):
    groups, rows, dim, slices = shape
    z = torch.randn(groups, rows, dim).to(dtype).requires_grad_()
    sizes = traced(lambda z: sigreg_loss(z, slices=slices, backend=cpu.name), z)
    assert ELEMENT * groups * rows * slices <= peak(sizes) <= limit(*shape, 16)


@pytest.mark.parametrize("shape", SHAPES)
def test_strided_input_earns_no_copy(cpu, shape):
    groups, rows, dim, slices = shape
    a = sigreg_directions(dim, slices, backend=cpu.name)
    z = torch.randn(groups, dim, rows).transpose(1, 2).requires_grad_()
    dense = z.detach().contiguous().requires_grad_()

    def function(z):
        return sigreg_loss(z, directions=a, backend=cpu.name)

    assert peak(traced(function, z)) <= peak(traced(function, dense)) + CONSTANT


def test_nothing_of_all_knots_is_made(cpu):
    """No allocation grows with N M K; the reference's do."""
    _, rows, dim, slices = SHAPES[0]
    z = torch.randn(rows, dim).requires_grad_()
    for name, few in ((cpu.name, True), ("reference", False)):
        sizes = traced(lambda z, name=name: sigreg_loss(z, slices=slices, backend=name), z)
        assert (max(sizes) <= ELEMENT * rows * slices) == few


def test_a_tenth_of_the_published_form(cpu):
    z = torch.randn(512, 64).requires_grad_()
    ours = peak(traced(lambda z: sigreg_loss(z, slices=512, backend=cpu.name), z))
    theirs = peak(traced(lambda z: sigreg_loss(z, slices=512, backend="reference"), z))
    assert 10 * ours <= theirs
