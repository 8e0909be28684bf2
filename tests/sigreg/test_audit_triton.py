"""Tier 5: the SIGReg op's Triton kernels compiled ahead of time: no spills and no slow path of sin
or cos, registers and shared memory within the recorded budget, tensor-core instructions and 16-byte
loads where meant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.helpers import audit_triton
from tests.helpers.audit_triton import ARCHITECTURES, MATRIX, Recorder

# Minutes of compiling.

KERNELS = (
    "directions_kernel",
    "sums_kernel",
    "finish_kernel",
    "statistic_kernel",
    "waves_kernel",
    "product_kernel",
)
PRODUCTS = ("sums_kernel", "product_kernel")
# 17 knots on [0, 3]; 41 on [0, 5], in chunks; twenty of any spacing. Without 0.
KNOTS = {
    "17": [3 * k / 16 for k in range(1, 17)],
    "41": [5 * k / 40 for k in range(1, 41)],
    "free": [0.02 * k * k for k in range(1, 21)],
}
LARGE, SMALL = (2048, 512, 1024), (512, 192, 1024)


class Case(NamedTuple):
    """A kernel of a launch. shape: N, D, M of one group."""

    arch: int
    dtype: str
    kernel: str
    knots: str = "17"
    shape: tuple[int, int, int] = LARGE

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"sm_{self.arch}-{self.dtype}-{shape}-{self.knots}-{self.kernel}"


def _cases() -> Iterator[Case]:
    for arch in ARCHITECTURES:
        for kernel in KERNELS:
            yield Case(arch, "float32", kernel)
        for kernel in (*PRODUCTS, "waves_kernel"):
            yield Case(arch, "bfloat16", kernel)
        yield Case(arch, "float16", "product_kernel")
        for knots in ("41", "free"):
            yield Case(arch, "bfloat16", "sums_kernel", knots, SMALL)
        yield Case(arch, "float32", "waves_kernel", "free", SMALL)
        yield Case(arch, "float32", "statistic_kernel", "41", SMALL)


CASES = list(_cases())


def launched(case: Case) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    import torch

    from vicreg_kernels.core.triton import device as devices
    from vicreg_kernels.sigreg.triton import launch as launchers

    kernels: dict[str, Any] = {}
    names = KERNELS
    kept = {name: getattr(launchers, name) for name in names}
    rows, dim, slices = case.shape
    dtype, knots = getattr(torch, case.dtype), KNOTS[case.knots]
    real = devices.device
    try:
        for name in KERNELS:
            setattr(launchers, name, Recorder(kept[name], kernels))
        devices.device = lambda index: devices.Device("default", 132, case.arch // 10)
        z = torch.empty(1, rows, dim, dtype=dtype, device="meta")
        step = torch.empty((), dtype=torch.int64, device="meta")
        a = launchers.directions(z, step, 0, 2**40, dim, slices)
        launchers.sums(z, a, knots)
        weights = [math.exp(-0.5 * t * t) for t in knots]
        loss, coefficients, p = launchers.forward(z, a, knots, weights, float(rows), 1.0)
        launchers.gradient(loss, coefficients, p, a, knots)
    finally:
        devices.device = real
        for name, value in kept.items():
            setattr(launchers, name, value)
    return kernels[case.kernel]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case: Case, compiled: dict[str, Any]) -> None:
    kernel = compiled[str(case)]
    audit_triton.check("sigreg", str(case), kernel)
    if case.kernel in PRODUCTS:
        assert kernel["matrix"] == [MATRIX[case.arch]]
    else:
        assert kernel["matrix"] == []
    if case.kernel not in ("directions_kernel", "finish_kernel"):
        assert kernel["wide_loads"] > 0, "every load is narrower than 16 bytes"


if __name__ == "__main__":
    audit_triton.record("sigreg", launched, CASES)
