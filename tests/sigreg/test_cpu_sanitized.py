"""Tier 2: SIGReg's CPU kernels under AddressSanitizer and UBSan, on shapes that meet every edge."""

from __future__ import annotations

import pytest

from tests.helpers import native

pytestmark = pytest.mark.thorough

PROGRAM = """
import sys, torch
from tests.helpers import native
from vicreg_kernels.sigreg import reference
torch.ops.load_library(sys.argv[1])
op = torch.ops.vicreg_kernels_sanitized
torch.manual_seed(0)
rules = [[3 * k / 16 for k in range(1, 17)], [(2 * k + 1) / 3 for k in range(5)], [1.0],
         [k / 8 for k in range(1, 65)], [(2 * k + 1) / 8 for k in range(33)], [0.1, 0.5, 0.6]]
shapes = [(1, 2, 1, 1), (1, 3, 2, 15), (2, 5, 7, 16), (1, 33, 3, 17), (2, 129, 6, 130),
          (1, 260, 5, 65)]
step = torch.tensor(7)
for seed in (0, -1):
    op.sigreg_directions(torch.ones(1), None, 7, seed, 6, 33)
for groups, rows, dim, slices in shapes:
    a = op.sigreg_directions(torch.ones(1), step, 0, 3, dim, slices)
    assert (a - reference.directions(step, 3, dim, slices)).abs().max() < 1e-6
    for knots in rules:
        weights = [0.5 / (1.0 + t) for t in knots]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            z = torch.randn(groups, dim, rows).to(dtype).transpose(1, 2)
            own = a.to(dtype)
            sums, p = op.sigreg_sums(z, own, knots)
            loss, coefficients = op.sigreg_statistic(sums, knots, weights, rows, rows, 1.0)
            grad = op.sigreg_gradient(torch.ones(1), coefficients, p, own, knots)
            wide = z.double().requires_grad_()
            truth = reference.loss(wide, own.double(), knots, weights, rows, rows)
            truth.backward()
            torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-4, atol=1e-6)
            error = (grad.double() - wide.grad).norm() / wide.grad.norm()
            assert error < (1e-4 if dtype == torch.float32 else 1e-2), (rows, knots, dtype, error)
print("clean", flush=True)
op.sigreg_gradient(torch.ones(1), native.shortened(coefficients), p, own, knots)
print("not seen")
"""


@pytest.fixture(scope="module")
def done():
    return native.run_sanitized(PROGRAM, native.sanitized("sigreg"))


def test_every_edge_is_clean(done) -> None:
    assert done.stdout.startswith("clean"), done.stderr[-4000:]


def test_a_planted_overrun_is_seen(done) -> None:
    """The build really is instrumented: coefficients short of memory must be reported."""
    assert done.stdout.strip() == "clean"
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
