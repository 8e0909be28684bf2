"""Memory of adaptive layer norm: its results and two floats a token; no repeated vector, no normed
copy.
"""

from __future__ import annotations

import pytest
import torch

from bench import measure
from tests.adaln.cases import draw, vectors
from vicreg_kernels.adaln import gated_residual, modulated_layer_norm

CPU = torch.device("cpu")
CONSTANT = 1 << 14


@pytest.fixture
def cpu(fused):
    if fused.device != "cpu":
        pytest.skip("the CPU allocator's count")
    return fused.name


def peak(function, *leaves):
    """Of a forward and a backward on an incoming gradient that takes no memory."""

    def step():
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, out.new_ones(()).expand(out.shape))

    step()
    return measure.peak_memory(step, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 8, 64, 96), (1, 1, 1500, 64)])
def test_the_output_and_the_gradients(cpu, shape, dtype):
    x, y = (draw(*shape, dtype=dtype) for _ in "xy")
    shift, scale, gate = vectors(3, shape, dtype=dtype)
    whole, small = x.nbytes, 16 * shift.numel() + 8 * x.numel() // shape[-1]
    # the parts of a frame of more than 128 tokens
    small += 8 * x.numel() // 100 + CONSTANT

    def norm(*z):
        return modulated_layer_norm(*z, backend=cpu)

    assert 2 * whole <= peak(norm, x, shift, scale) <= 2 * whole + small
    # x's own gradient is the incoming one
    assert (
        whole <= peak(lambda *z: gated_residual(*z, backend=cpu), x, y, gate) <= 2 * whole + small
    )


def test_the_published_form_breaks_the_limit(cpu):
    """The measure tells the two apart."""
    x, (shift, scale) = draw(2, 8, 64, 96), vectors(2, (2, 8, 64, 96))

    def published(x, shift, scale):
        repeated = [z.repeat_interleave(64, dim=1).view_as(x) for z in (shift, scale)]
        return torch.nn.functional.layer_norm(x, (96,)) * (1 + repeated[1]) + repeated[0]

    assert peak(published, x, shift, scale) > 4 * x.nbytes
