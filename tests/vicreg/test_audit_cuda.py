"""Tier 5: the VICReg op's cuda.cu compiled by nvcc and linked."""

from __future__ import annotations

import re

import pytest

from tests.helpers import audit_cuda


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_no_spills(architecture):
    audit_cuda.check_no_spills("vicreg", architecture, count=39)


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_within_budget(architecture):
    audit_cuda.check_within_budget("vicreg", architecture)


def test_vector_kernels_access_16_bytes():
    kernels = re.split(r"\.visible \.entry (?:void )?", audit_cuda.ptx("vicreg"))[1:]
    seen = 0
    for kernel in kernels:
        name = kernel.split("(")[0]
        if "tf32x3_" in name:  # whether 16 bytes are aligned is seen at run time
            copies = set(re.findall(r"cp\.async\.\w+\.shared\.global [^;]*, (\d+), ", kernel))
            assert copies == ({"16", "4"} if "_tiles" in name else set()), name
            continue
        vectors = len(re.findall(r"ld\.global(?:\.nc)?\.v4\.", kernel))
        stores = len(re.findall(r"st\.global\.wb\.v[24]\.", kernel))  # 8 bytes of a half gradient
        if re.search(r"<\w+, true", name):
            seen += 1
            assert vectors > 0, name
            assert stores > 0 or "column_partials" in name, name
            assert not re.search(r"st\.global\.(u16|b16|v\d\.[bu]16)", kernel), name
        elif re.search(r"<\w+, false", name):
            assert vectors == stores == 0, name
    assert seen == 12


def test_links_against_the_stable_abi_alone():
    audit_cuda.check_links_against_the_stable_abi_alone("vicreg")
