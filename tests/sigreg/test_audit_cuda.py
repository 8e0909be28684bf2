"""Tier 5: the SIGReg op's cuda.cu compiled by nvcc and linked."""

from __future__ import annotations

import pytest

from tests.helpers import audit_cuda

KERNELS = 22


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_no_spills(architecture):
    # 80 registers leave three blocks of 256 threads
    audit_cuda.check_no_spills("sigreg", architecture, count=KERNELS, most_registers=80)


def test_no_local_memory():
    """sincosf's slow path would take some, and so would a table with a variable index."""
    report = audit_cuda.compiled("sigreg").with_suffix(".txt").read_text()
    frames = [line for line in report.splitlines() if "bytes stack frame" in line]
    assert len(frames) == KERNELS * len(audit_cuda.ARCHITECTURES)
    assert all(" 0 bytes stack frame" in line for line in frames), frames


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_within_budget(architecture):
    audit_cuda.check_within_budget("sigreg", architecture)


def test_links_against_the_stable_abi_alone():
    audit_cuda.check_links_against_the_stable_abi_alone("sigreg")
