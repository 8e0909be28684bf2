"""Runs a test file in a second process, in which Triton's interpreter takes the place of a GPU.

Kernels are made for the interpreter or for a GPU when they are imported, so one process cannot hold
both. The interpreter takes seconds for what a GPU does in microseconds: `make test` runs a sample
of each file's draws (`sampled`), `make audit` the rest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from vicreg_kernels import dispatch

INTERPRETING = dispatch.interpreting()


def all_of(file: str) -> Callable[[str], None]:
    """The test that runs the tests of `file` under TRITON_INTERPRET=1."""

    @pytest.mark.skipif(
        dispatch.library.TRITON_MISSING is not None, reason="triton is not installed"
    )
    @pytest.mark.parametrize(
        "which", ["not thorough", pytest.param("thorough", marks=pytest.mark.thorough)]
    )
    def test_in_an_interpreting_process(which: str) -> None:
        command = [sys.executable, "-m", "pytest", "-x", "-W", "ignore", "-m", which, file]
        run = subprocess.run(
            command,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
        assert " passed" in run.stdout, run.stdout[-2000:]

    return test_in_an_interpreting_process
