"""Tier 2: the CPU kernels built with AddressSanitizer and UBSan, on shapes that meet every edge."""

from __future__ import annotations

import pytest

from tests.helpers import native

pytestmark = pytest.mark.thorough

PROGRAM = """
import sys, torch
from tests.helpers import native
from vicreg_kernels.vicreg import reference
library, off_by_one = sys.argv[1], sys.argv[2] == "off_by_one"
torch.ops.load_library(library)
op = torch.ops.vicreg_kernels_sanitized
settings = (1.1, 1e-4, True, [1.0, 0.5, 0.2], [25.0, 25.0, 1.0])
torch.manual_seed(0)
shapes = [(1, 2, 2), (1, 2, 3), (1, 3, 2), (2, 5, 1), (1, 17, 17), (3, 31, 37), (1, 33, 600),
          (1, 300, 19), (2, 129, 257), (1, 260, 130), (1, 700, 701)]
for groups, rows, dim in shapes:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(groups, rows, dim).to(dtype)
        y = torch.randn(groups, dim, rows).to(dtype).transpose(1, 2)
        out = op.vicreg_forward(x, y, *settings)
        saved = list(out[1:])
        if off_by_one:
            native.shortened(saved[0])  # the moments
        grads = op.vicreg_backward(torch.ones(1), x, y, *saved, True, True, *settings)
        a, b = x.double().requires_grad_(), y.double().requires_grad_()
        loss = reference.terms(a, b, *settings)[0]
        loss.backward()
        torch.testing.assert_close(out[0][0].double(), loss.detach(), rtol=1e-5, atol=1e-6)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for grad, truth in zip(grads, (a.grad, b.grad)):
            error = (grad.double() - truth).norm() / truth.norm()
            assert error < tolerance, (groups, rows, dim, dtype, error)
        op.vicreg_forward(x, None, *settings)
print("clean")
"""


def run(mode: str):
    return native.run_sanitized(PROGRAM, native.sanitized("vicreg"), mode)


def test_every_edge_is_clean() -> None:
    done = run("plain")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


def test_a_planted_overrun_is_seen() -> None:
    """The build really is instrumented: saved moments short of memory must be reported."""
    done = run("off_by_one")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
