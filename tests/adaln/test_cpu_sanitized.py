"""Tiers 2 and 3: adaptive layer norm's CPU kernels, and its CUDA kernels under the emulator, with
AddressSanitizer and UBSan.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import native

pytestmark = pytest.mark.thorough

PROGRAM = Path(__file__).with_name("sanitized.py").read_text()
BUILDS = {
    "cpu": (native.sanitized, "vicreg_kernels_sanitized"),
    "cuda": (lambda op: native.emulated(op, sanitize=True), "vicreg_kernels_emulator"),
}


def run(build: str, mode: str):
    make, namespace = BUILDS[build]
    return native.run_sanitized(PROGRAM, make("adaln"), namespace, mode)


@pytest.mark.parametrize("build", BUILDS)
def test_every_edge_is_clean(build):
    done = run(build, "plain")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


@pytest.mark.parametrize("build", BUILDS)
def test_a_planted_overrun_is_seen(build):
    """The build really is instrumented: saved floats one short must be reported."""
    done = run(build, "short")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
