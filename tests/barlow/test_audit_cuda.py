"""Tier 5: the Barlow Twins op's cuda.cu compiled by nvcc, and linked.

`VICREG_KERNELS_AUDIT=all python -m tests.helpers.audit_cuda barlow` records the budget.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import audit_cuda


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_no_spills(architecture):
    audit_cuda.check_no_spills("barlow", architecture, count=42)


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_within_budget(architecture):
    audit_cuda.check_within_budget("barlow", architecture)


def machine_code() -> dict[str, str]:
    """Of each kernel on sm_90, from the object that the other tests compile."""
    tool = shutil.which("cuobjdump") or str(Path(audit_cuda.nvcc()).with_name("cuobjdump"))
    if not Path(tool).exists():
        triton = pytest.importorskip("triton")
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    command = [tool, "--dump-sass", "-arch", "sm_90", str(audit_cuda.compiled("barlow"))]
    listing = subprocess.check_output(command, text=True)
    text = subprocess.check_output(["c++filt"], input=listing, text=True)
    blocks = text.split("Function : ")[1:]
    names = (re.sub(r"\w+::", "", block.split("(")[0].removeprefix("void ")) for block in blocks)
    return dict(zip(names, blocks, strict=True))


def test_accesses_and_atomics():
    """16-byte loads wherever the template says vectors; no atomic but the count of blocks that are
    through, an integer.
    """
    kernels = machine_code()
    assert len(kernels) == 42
    for name, code in kernels.items():
        wide = len(re.findall(r"\bLDG\.E\.128", code))
        if "tf32x3_tiles" in name:  # whether 16 bytes are aligned is seen at run time
            assert re.search(r"\bLDGSTS\.E\.BYPASS\.128", code), name
            assert "HMMA.1688.F32.TF32" in code, name
        elif ", true>" in name:
            assert wide > 0, name
        elif ", false>" in name:
            assert wide == 0, name
        narrow = re.findall(r"\bSTG\.E\.U16", code)
        assert not (", true>" in name and narrow), name
        atomics = re.findall(r"\b(?:ATOM|ATOMG|RED)\.[\w.]+", code)
        counts = name == "gram_rows" or name == "cross_rows"
        assert bool(atomics) == counts, (name, atomics)
        assert all(".ADD" in atomic and ".F" not in atomic for atomic in atomics), atomics


def test_links_against_the_stable_abi_alone():
    audit_cuda.check_links_against_the_stable_abi_alone("barlow")
