"""Tier 2: the CPU kernels built with AddressSanitizer and UBSan, on shapes that meet every edge."""

from __future__ import annotations

import pytest

from tests.helpers import native

pytestmark = pytest.mark.thorough

PROGRAM = """
import sys, torch
from tests.helpers import native
from vicreg_kernels.barlow import reference
library, off_by_one = sys.argv[1], sys.argv[2] == "off_by_one"
torch.ops.load_library(library)
op = torch.ops.vicreg_kernels_sanitized
torch.manual_seed(0)
torch.set_num_threads(2)
shapes = [(2, 2), (2, 3), (3, 2), (5, 1), (17, 17), (31, 37), (33, 600), (300, 19), (129, 257),
          (260, 130), (5, 1100), (1100, 5), (140, 141)]
for i, (rows, dim) in enumerate(shapes):
    settings = ((1e-5, 0.0, False, 0.3), (0.0, 1e-5, True, 0.0051))[i % 2]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(rows, dim).to(dtype)
        y = torch.randn(dim, rows).to(dtype).t()
        out = op.barlow_forward(x, y, *settings)
        saved = list(out[1:])
        if off_by_one:
            native.shortened(saved[0])  # the moments
        grads = op.barlow_backward(torch.ones(1), x, y, *saved, True, True, *settings)
        a, b = x.double().requires_grad_(), y.double().requires_grad_()
        loss = reference.loss(a, b, *settings)
        loss.backward()
        torch.testing.assert_close(out[0][0].double(), loss.detach(), rtol=1e-5, atol=1e-6)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for grad, truth in zip(grads, (a.grad, b.grad)):
            error = (grad.double() - truth).norm() / truth.norm()
            assert rows == 2 or error < tolerance, (rows, dim, dtype, error)
    op.barlow_backward(torch.ones(1), x, y, *saved, i % 3 > 0, i % 3 < 2, *settings)
print("clean")
"""


def run(mode: str):
    return native.run_sanitized(PROGRAM, native.sanitized("barlow"), mode)


def test_every_edge_is_clean() -> None:
    done = run("plain")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


def test_a_planted_overrun_is_seen() -> None:
    """The build really is instrumented: saved moments short of memory must be reported."""
    done = run("off_by_one")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
