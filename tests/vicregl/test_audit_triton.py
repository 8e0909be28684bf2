"""Tier 5: the VICRegL ops' Triton kernels compiled ahead of time: no spills, registers and shared
memory within the recorded budget, 16-byte loads where rows are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.helpers import audit_triton
from tests.helpers.audit_triton import Recorder

KERNELS = ("match_kernel", "rank_kernel", "pairs_kernel", "pairs_gradient_kernel")


class Case(NamedTuple):
    """A kernel of a launch. shape: views of both, samples, positions of both, channels."""

    arch: int
    dtype: str
    shape: tuple[int, ...]
    kernel: str

    def __str__(self) -> str:
        return f"sm_{self.arch}-{self.dtype}-{'x'.join(map(str, self.shape))}-{self.kernel}"


# Two large views; two large and six small ones; grids; narrow maps, under `make audit` alone.
LARGE, SMALL = (1, 1, 64, 49, 49, 512), (2, 6, 64, 49, 9, 512)
GRIDS, NARROW = (1, 1, 64, 49, 49, 2), (1, 1, 64, 49, 49, 64)
ALL = len(audit_triton.ARCHITECTURES) > 1


def _cases() -> Iterator[Case]:
    for arch in audit_triton.ARCHITECTURES:
        for kernel in KERNELS:
            yield Case(arch, "float32", LARGE, kernel)
        for kernel in KERNELS if ALL else ("pairs_gradient_kernel",):
            yield Case(arch, "bfloat16", SMALL, kernel)
        for shape in (GRIDS, NARROW) if ALL else (GRIDS,):
            yield Case(arch, "float32", shape, "match_kernel")


CASES = list(_cases())


def launched(case: Case) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    import torch

    from vicreg_kernels.core.triton import device as devices
    from vicreg_kernels.vicregl.triton import launch as launchers

    views_a, views_b, samples, rows_a, rows_b, dim = case.shape
    dtype = getattr(torch, case.dtype)
    a = torch.empty(views_a, samples, rows_a, dim, dtype=dtype, device="meta")
    b = torch.empty(views_b, samples, rows_b, dim, dtype=dtype, device="meta")
    rules = [20, 4], [0.5, 0.5], [min(20, rows_b), 4], [0.5, 0.5]
    kernels: dict[str, Any] = {}
    names = (*KERNELS, "finish_kernel")
    replaced = {name: getattr(launchers, name) for name in names}
    real = devices.device
    try:
        for name in names:
            setattr(launchers, name, Recorder(replaced[name], kernels))
        devices.device = lambda index: devices.Device("default", 132, case.arch // 10)
        matches = launchers.match(a, b)
        loss = launchers.pairs_forward(a, b, *matches, *rules)
        launchers.pairs_backward(loss, a, b, *matches, True, True, *rules)
    finally:
        devices.device = real
        for name, value in replaced.items():
            setattr(launchers, name, value)
    return kernels[case.kernel]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case: Case, compiled: dict[str, Any]) -> None:
    kernel = compiled[str(case)]
    audit_triton.check("vicregl", str(case), kernel)
    assert kernel["matrix"] == []
    if case.kernel != "rank_kernel" and case.shape != GRIDS:
        assert kernel["wide_loads"] > 0, "every load is narrower than 16 bytes"
    if case.kernel == "match_kernel" and case.arch < 100 and kernel["fused"] is not None:
        assert kernel["fused"] >= 16, "squares are not multiply-adds"  # sm_100 packs two in one


if __name__ == "__main__":
    audit_triton.record("vicregl", launched, CASES)
