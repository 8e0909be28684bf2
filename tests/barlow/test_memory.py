"""Memory of forward and backward: at most 5/2 N D + 2 min(N, D)^2 elements, gradients included.

Counted from outside the inputs, as the running peak of what torch's allocator handed out, the C++
kernels' scratch included.
"""

from __future__ import annotations

import pytest
import torch

from bench.measure import peak_memory
from vicreg_kernels.barlow import barlow_twins_loss

ELEMENT = 4  # bytes of float32
# Moments, the diagonal: O(D) elements; scalars.
COLUMNS = 16
CONSTANT = 1 << 14


def limit(rows: int, dim: int) -> int:
    """Bytes."""
    side = min(rows, dim)
    return ELEMENT * (5 * rows * dim // 2 + 2 * side**2 + COLUMNS * dim) + CONSTANT


def peak(backend: str, x: torch.Tensor, y: torch.Tensor) -> int:
    def step():
        return torch.autograd.grad(barlow_twins_loss(x, y, backend=backend), (x, y))

    step()
    return peak_memory(step, x.device)


@pytest.mark.parametrize("shape", [(64, 2048), (256, 1024), (256, 257), (256, 256), (1024, 256)])
@pytest.mark.parametrize("transposed", [False, True])
def test_peak(fused, shape, transposed):
    if fused.device != "cpu":
        pytest.skip("the CPU kernels' limit")
    pair = (torch.randn(shape) for _ in "xy")
    x, y = ((z.t().contiguous().t() if transposed else z).requires_grad_() for z in pair)
    assert 2 * ELEMENT * shape[0] * shape[1] <= peak(fused.name, x, y) <= limit(*shape)


def test_the_reference_breaks_the_limit():
    """The measure tells the two formulas apart."""
    x, y = (torch.randn(64, 1024, requires_grad=True) for _ in "xy")
    assert peak("reference", x, y) > limit(64, 1024)
