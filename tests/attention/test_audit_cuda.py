"""Tier 5: the attention op's cuda.cu compiled by nvcc and linked.

The budget's static shared memory is 0: the kernels' is dynamic, counted in the launchers.
"""

from __future__ import annotations

import re

import pytest

from tests.helpers import audit_cuda


def kernels() -> dict[str, str]:
    """PTX by kernel."""
    parts = re.split(r"\.visible \.entry (?:void )?", audit_cuda.ptx("attention"))[1:]
    return {re.sub(r"\w+::", "", part.split("(")[0]): part for part in parts}


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_no_spills(architecture):
    """Forward and backward for 8 head dims and 2 types, rotation for 3 types by alignment."""
    audit_cuda.check_no_spills("attention", architecture, count=38, most_registers=255)


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_occupancy(architecture):
    """Registers for 16 warps on a multiprocessor where head dims allow it, else for 12."""
    for name, kernel in audit_cuda.usage("attention")[architecture].items():
        dim = re.search(r"(forward|backward)<\w+, (\d+)>", name)
        if dim is None:
            assert kernel["registers"] <= 64, name
        elif int(dim[2]) <= (96 if dim[1] == "forward" else 64):
            assert kernel["registers"] <= 128, name
        elif dim[1] == "forward" or dim[2] == "80":
            assert kernel["registers"] <= 168, name


@pytest.mark.parametrize("architecture", audit_cuda.ARCHITECTURES)
def test_within_budget(architecture):
    audit_cuda.check_within_budget("attention", architecture)


def test_products_run_on_the_tensor_cores():
    counts = {}
    for name, code in kernels().items():
        if "rotate" in name:
            assert "mma.sync" not in code
            continue
        bits = "f16" if "half" in name else "bf16"
        kind = rf"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.{bits}\.{bits}\.f32"
        counts[name] = len(re.findall(kind, code))
        assert counts[name] == len(re.findall(r"mma\.sync", code)), name
        assert len(re.findall(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared", code)) > 0, name
        assert len(re.findall(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared", code)) > 0, name
    assert len(counts) == 32
    assert all(count > 0 for count in counts.values())
    # 80 is padded to no power of two
    assert (
        counts["attention_forward<__half, 80>"] * 8 == counts["attention_forward<__half, 128>"] * 5
    )


def test_global_memory_moves_in_16_bytes():
    """Reads are asynchronous copies, or scalar for other strides; writes are vectors."""
    for name, code in kernels().items():
        vectors = len(re.findall(r"st\.global\.wb\.v4\.", code))
        assert vectors > 0, name
        assert not re.search(r"st\.global\.(u16|b16)|st\.global\.v\d\.[bu]16", code), name
        if "rotate" not in name:
            assert len(re.findall(r"cp\.async\.cg\.shared\.global", code)) > 0, name
        elif "true" in name:
            assert re.search(r"ld\.global(\.nc)?\.v4\.", code), name
            assert not re.search(r"ld\.global(\.nc)?\.[bu]16", code), name


def test_no_atomics_and_no_local_memory():
    for name, code in kernels().items():
        assert not re.search(r"\b(atom|red)\.", code), name
        assert ".local" not in code, name


def test_links_against_the_stable_abi_alone():
    audit_cuda.check_links_against_the_stable_abi_alone("attention")
