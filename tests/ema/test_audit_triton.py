"""Tier 5: the EMA's Triton kernel compiled ahead of time: no spills,
registers within the recorded budget, 16-byte accesses, no fused multiply-add.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tests.helpers import audit_triton
from tests.helpers.audit_triton import ARCHITECTURES, Recorder


class Case(NamedTuple):
    """dtypes of target, online and shadow ("none": none); layout: "flat" or "strided"."""

    arch: int
    dtypes: tuple[str, str, str]
    rounding: str = "nearest"
    layout: str = "flat"
    momentum: str = "number"

    def __str__(self) -> str:
        return f"sm_{self.arch}-{'-'.join((*self.dtypes, *self[2:]))}"


FLOAT, MIXED, HALF, FP16 = (
    ("float32", "float32", "none"),
    ("float32", "bfloat16", "bfloat16"),
    ("bfloat16", "bfloat16", "none"),
    ("float16", "float32", "float16"),
)
CASES = [
    case
    for arch in ARCHITECTURES
    for case in (
        Case(arch, FLOAT),
        Case(arch, FLOAT, momentum="tensor"),
        Case(arch, MIXED),
        Case(arch, HALF),
        Case(arch, HALF, "stochastic", momentum="tensor"),
        Case(arch, FP16, "stochastic"),
        Case(arch, FLOAT, layout="strided"),
        Case(arch, FP16, "stochastic", "strided"),
    )
]


def launched(case: Case) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    import torch

    from vicreg_kernels.ema.triton import launch as launcher

    kernels: dict[str, Any] = {}
    kept = launcher.update_kernel
    shape = (64, 128)
    made = [
        [torch.empty(shape, dtype=getattr(torch, name), device="meta")] if name != "none" else []
        for name in case.dtypes
    ]
    if case.layout == "strided":
        made[1] = [made[1][0].t().contiguous().t()]
    scalar = torch.empty((), device="meta") if case.momentum == "tensor" else None
    step = torch.empty((), dtype=torch.int64, device="meta") if scalar is not None else None
    try:
        launcher.update_kernel = Recorder(kept, kernels)
        launcher.update_(*made, scalar, 0.996, case.rounding == "stochastic", 2**40, step, 7)
    finally:
        launcher.update_kernel = kept
    return kernels["update_kernel"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case: Case, compiled: dict[str, Any]) -> None:
    kernel = compiled[str(case)]
    audit_triton.check("ema", str(case), kernel)
    assert kernel["fused"] == 0, (
        "a product and a sum are contracted: the bits are another backend's"
    )
    if case.layout == "flat":
        assert kernel["wide_loads"] > 0
        assert kernel["wide_stores"] > 0


if __name__ == "__main__":
    audit_triton.record("ema", launched, CASES)
