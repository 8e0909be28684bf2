"""Tier 5: the EMA's cuda.cu compiled by nvcc and linked."""

from __future__ import annotations

import re

import pytest

from tests.helpers import audit_cuda


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_no_spills(architecture):
    # 80 registers leave three blocks of 256 threads, 48 KiB and more in flight
    audit_cuda.check_no_spills("ema", architecture, count=2, most_registers=80)


def test_no_stack():
    """The table is read where it lies, in the parameters: a copy would be 28 KiB a thread."""
    report = audit_cuda.compiled("ema").with_suffix(".txt").read_text()
    assert re.findall(r"(\d+) bytes stack frame", report) == ["0"] * 2 * len(
        audit_cuda.ARCHITECTURES
    )


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_within_budget(architecture):
    audit_cuda.check_within_budget("ema", architecture)


def test_accesses_of_16_bytes():
    kernels = re.split(r"\.visible \.entry (?:void )?", audit_cuda.ptx("ema"))[1:]
    accesses = {}
    for kernel in kernels:
        name = re.search(r"(\w+_kernel)\(", kernel).group(1)
        loads = len(re.findall(r"ld\.global(?:\.nc)?\.v4\.", kernel))
        accesses[name] = loads, len(re.findall(r"st\.global\.wb\.v4\.", kernel))
    # targets of 3 dtypes x onlines of 3, in packs of 4 or 8 elements, 16 a thread: 4 loads of a
    # float32 target and 2 of a half one, 4 or 0 (8 bytes) and 4 or 2 of the online tensor
    targets, onlines = 3 * 4 + 6 * 2, 4 + 2 * 4 + 4 * 2
    assert accesses["update_kernel"][0] == targets + onlines
    assert accesses["update_kernel"][1] >= targets
    assert accesses["strided_kernel"] == (0, 0)


def test_no_fused_multiply_add():
    """One would give other bits than every other backend. ptxas leaves .rn operations alone; those
    of the stochastic rounding without it are exact either way.
    """
    text = audit_cuda.ptx("ema")
    assert not re.search(r"\bfma\.", text)
    assert len(re.findall(r"\bmul\.rn\.f32", text)) > 100
    assert not re.search(r"\badd\.f32", text)


def test_links_against_the_stable_abi_alone():
    audit_cuda.check_links_against_the_stable_abi_alone("ema")
