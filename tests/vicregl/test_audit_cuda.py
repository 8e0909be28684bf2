"""Tier 5: the VICRegL ops' cuda.cu compiled by nvcc, and linked.

`VICREG_KERNELS_AUDIT=all python -m tests.helpers.audit_cuda vicregl` records the budget.
"""

from __future__ import annotations

import re

import pytest

from tests.helpers import audit_cuda, native


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_no_spills(architecture):
    audit_cuda.check_no_spills("vicregl", architecture, count=22)


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_within_budget(architecture):
    audit_cuda.check_within_budget("vicregl", architecture)


@pytest.mark.skipif(audit_cuda.ARCHITECTURES != audit_cuda.EVERY, reason="make audit")
def test_vector_kernels_access_16_bytes():
    """A search reads 4 elements at a time, 8 bytes of a half map; it writes single keys."""
    kernels = re.split(r"\.visible \.entry (?:void )?", audit_cuda.ptx("vicregl"))[1:]
    seen = 0
    for kernel in kernels:
        name = kernel.split("(")[0]
        loads = len(re.findall(r"ld\.global(?:\.nc)?\.v4\.", kernel))
        stores = len(re.findall(r"st\.global\.wb\.v4\.", kernel))
        if re.search(r"match_tiles<4|, true>", name):
            seen += 1
            assert loads > 0, name
            assert (stores > 0) == ("pair_gradients" in name), name
        else:
            assert loads == stores == 0, name
    assert seen == 4 + 3 + 3


def test_no_atomics():
    sources = (native.ROOT / "csrc" / "vicregl").glob("*.cu*")
    assert not [path.name for path in sources if "atomic" in path.read_text()]


def test_links_against_the_stable_abi_alone():
    audit_cuda.check_links_against_the_stable_abi_alone("vicregl")
