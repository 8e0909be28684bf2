"""Tier 2: VICRegL's CPU kernels built with AddressSanitizer and UBSan, on shapes that meet every
edge.
"""

from __future__ import annotations

import pytest

from tests.helpers import native

pytestmark = pytest.mark.thorough

PROGRAM = """
import sys, torch
from tests.helpers import native
from vicreg_kernels.vicregl import reference
library, short = sys.argv[1], sys.argv[2] == "short"
torch.ops.load_library(library)
op = torch.ops.vicreg_kernels_sanitized
torch.manual_seed(0)
shapes = [(1, 1, 1, 1, 1, 1), (2, 1, 2, 3, 2, 2), (1, 3, 3, 5, 7, 8), (1, 1, 2, 49, 49, 33),
          (2, 2, 1, 9, 4, 7), (1, 1, 1, 17, 130, 41)]
for u, v, batch, l1, l2, channels in shapes:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a = torch.randn(u, batch, l1, channels).to(dtype)
        b = torch.randn(v, l2, batch, channels).to(dtype).transpose(1, 2)
        matches = op.vicregl_match(a, b)
        if dtype == torch.float32:
            for mine, theirs in zip(matches, reference.match(a, b)):
                assert (mine != theirs).float().mean() < 0.02
        if short and l1 > 1:
            matches = [native.shortened(z) for z in matches]
        rules = ([l1, 1], [0.5, 1.0], [l2], [-2.0])
        value = op.vicregl_pairs_forward(a, b, *matches, *rules)
        for need in ((True, True), (True, False), (False, True)):
            grads = op.vicregl_pairs_backward(torch.ones(()), a, b, *matches, *need, *rules)
        grads = op.vicregl_pairs_backward(torch.ones(()), a, b, *matches, True, True, *rules)
        x, y = a.double().requires_grad_(), b.double().requires_grad_()
        truth = reference.pairs(x, y, *matches, *rules)
        truth.backward()
        torch.testing.assert_close(value.double(), truth.detach(), rtol=1e-5, atol=1e-5)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for mine, theirs in zip(grads, (x.grad, y.grad)):
            torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)
    nothing = op.vicregl_pairs_forward(a, b, *matches, [], [], [], [])
    assert nothing.item() == 0.0
print("clean")
"""


def test_every_edge_is_clean():
    done = native.run_sanitized(PROGRAM, native.sanitized("vicregl"), "plain")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


def test_a_planted_overrun_is_seen():
    """The build really is instrumented: matches short of memory must be reported."""
    done = native.run_sanitized(PROGRAM, native.sanitized("vicregl"), "short")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
