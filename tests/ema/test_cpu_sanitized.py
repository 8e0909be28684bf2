"""Tier 2: the EMA's CPU kernel built with AddressSanitizer and UBSan."""

from __future__ import annotations

import pytest

from tests.helpers import native

pytestmark = pytest.mark.thorough

PROGRAM = """
import sys, torch
from tests.helpers import native
from tests.ema import tensors as ema_tensors
from vicreg_kernels.ema import reference
library, mode = sys.argv[1:]
torch.ops.load_library(library)
op = torch.ops.vicreg_kernels_sanitized.ema_update_
torch.manual_seed(0)
shapes = [(), (0,), (1,), (7,), (8,), (3, 5), (2, 3, 4), (511,), (512,), (513,), (2, 700)]
targets, onlines, copies = ema_tensors.every_dtype(shapes)
if mode == "short":
    targets, onlines = [torch.randn(600)], [torch.randn(600)]
    copies = [torch.empty(600)]
for stochastic in (False, True):
    for m in (0.3, 0.996):
        mine, own = ema_tensors.again(targets), ema_tensors.again(copies)
        if mode == "short":
            native.shortened(own[0])
        op(mine, onlines, own, None, m, stochastic, 5, None, 2)
        expected, theirs = ema_tensors.again(targets), ema_tensors.again(copies)
        reference.update_(expected, onlines, theirs, None, m, stochastic, 5, None, 2)
        ema_tensors.assert_same_bits(mine, expected, "targets")
        ema_tensors.assert_same_bits(own, theirs, "shadows")
        op(mine, onlines, [], None, m, stochastic, 5, None, 2)
long = [torch.randn((1 << 22) + 5) for _ in range(2)]  # streamed shadows
shadow = [torch.empty((1 << 22) + 5, dtype=torch.float16)]
op(long[:1], long[1:], shadow, None, 0.9, False, 0, None, 0)
assert torch.equal(shadow[0], long[0].half())
print("clean")
"""


def run(mode: str):
    return native.run_sanitized(PROGRAM, native.sanitized("ema"), mode)


def test_every_edge_is_clean() -> None:
    done = run("plain")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


def test_a_planted_overrun_is_seen() -> None:
    """The build really is instrumented: a shadow short of memory must be reported."""
    done = run("short")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
