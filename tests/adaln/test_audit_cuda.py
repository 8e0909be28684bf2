"""Tier 5: adaptive layer norm's cuda.cu compiled by nvcc and linked.

`VICREG_KERNELS_AUDIT=all python -m tests.helpers.audit_cuda adaln` records the budget.
"""

from __future__ import annotations

import re

import pytest

from tests.helpers import audit_cuda


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_no_spills(architecture):
    audit_cuda.check_no_spills("adaln", architecture, count=39)


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_within_budget(architecture):
    audit_cuda.check_within_budget("adaln", architecture)


def test_vector_kernels_access_16_bytes():
    kernels = re.split(r"\.visible \.entry (?:void )?", audit_cuda.ptx("adaln"))[1:]
    seen = 0
    for kernel in kernels:
        name = kernel.split("(")[0]
        loads = len(re.findall(r"ld\.global(?:\.nc)?\.v4\.", kernel))
        stores = len(re.findall(r"st\.global\.wb\.v4\.", kernel))
        if re.search(r"Typed<\(?(int\))?[48]", name):
            seen += 1
            assert loads > 0, name
            assert stores > 0, name
        else:
            assert loads == stores == 0, name
    assert seen == 3 + 2 * 3 + 5 + 2 * 5


def test_no_atomics():
    assert not re.findall(r"(?<![\w.])(?:atom|red)\.[\w.]+", audit_cuda.ptx("adaln"))


def test_links_against_the_stable_abi_alone():
    audit_cuda.check_links_against_the_stable_abi_alone("adaln")
