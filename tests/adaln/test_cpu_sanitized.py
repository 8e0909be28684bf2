"""Tiers 2 and 3: adaptive layer norm's CPU kernels, and its CUDA kernels under the emulator, with
AddressSanitizer and UBSan.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import native

pytestmark = pytest.mark.thorough

PROGRAM = Path(__file__).with_name("sanitized.py").read_text()
BUILDS = ("cpu", "cuda")


@pytest.mark.parametrize("build", BUILDS)
def test_every_edge_is_clean(build):
    done = native.run_sanitized_build("adaln", build, PROGRAM, "plain")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


@pytest.mark.parametrize("build", BUILDS)
def test_a_planted_overrun_is_seen(build):
    """The build really is instrumented: saved floats one short must be reported."""
    done = native.run_sanitized_build("adaln", build, PROGRAM, "short")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
