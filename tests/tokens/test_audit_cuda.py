"""Tier 5: the tokens ops' cuda.cu compiled by nvcc and linked.

`VICREG_KERNELS_AUDIT=all python -m tests.helpers.audit_cuda tokens` records the budget.
"""

from __future__ import annotations

import re

import pytest

from tests.helpers import audit_cuda


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_no_spills(architecture):
    audit_cuda.check_no_spills("tokens", architecture, count=68)


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_within_budget(architecture):
    audit_cuda.check_within_budget("tokens", architecture)


def test_vector_kernels_access_16_bytes():
    kernels = re.split(r"\.visible \.entry (?:void )?", audit_cuda.ptx("tokens"))[1:]
    seen = 0
    for kernel in kernels:
        name = kernel.split("(")[0]
        loads = len(re.findall(r"ld\.global(?:\.nc)?\.v4\.", kernel))
        stores = len(re.findall(r"st\.global\.wb\.v4\.", kernel))
        narrow = re.findall(r"st\.global\.(?:u16|b16|v\d\.[bu]16)", kernel)
        if re.search(r"<(\w+::)*(uint4|\w+, true|Aligned<)", name) or "Aligned" in name:
            seen += 1
            assert loads > 0, name
            assert stores > 0 or "loss_rows" in name or "column_partials" in name, name
            assert not narrow, name
        else:
            assert loads == stores == 0, name
    assert seen == 2 + 9 + 7 + 28


def test_no_float_atomics():
    """Minima and maxima of integers alone, which do not depend on their order. A barrier that votes
    (barrier.red) writes no memory.
    """
    atomics = set(re.findall(r"(?<![\w.])(?:atom|red)\.[\w.]+", audit_cuda.ptx("tokens")))
    assert atomics
    assert all(re.search(r"\.(min|max)\.s32$", name) for name in atomics), atomics


def test_links_against_the_stable_abi_alone():
    audit_cuda.check_links_against_the_stable_abi_alone("tokens")
