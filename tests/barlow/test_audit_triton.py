"""Tier 5: the Barlow Twins op's Triton kernels compiled ahead of time: no spills, registers and
shared memory within the recorded budget, tensor-core instructions and 16-byte loads where meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.helpers import audit_triton
from tests.helpers.audit_triton import MATRIX, Recorder

PRODUCTS = ("gram_kernel", "cross_kernel", "gradient_kernel")
KERNELS = (
    *PRODUCTS,
    "statistics_kernel",
    "merge_kernel",
    "combine_kernel",
    "loss_kernel",
    "cross_squares_kernel",
    "finish_kernel",
)
GRAM, LARGE_GRAM, SPLIT, LARGE = (64, 8192), (2048, 8192), (16384, 384), (8192, 4096)


class Case(NamedTuple):
    arch: int
    dtype: str
    shape: tuple[int, int]
    kernel: str

    def __str__(self) -> str:
        return f"sm_{self.arch}-{self.dtype}-{'x'.join(map(str, self.shape))}-{self.kernel}"


def _cases() -> Iterator[Case]:
    """Every kernel once on sm_90, products also in their widest tiles; the rest of the launches on
    every architecture under VICREG_KERNELS_AUDIT=all.
    """
    for kernel in ("statistics_kernel", "gram_kernel", "combine_kernel", "finish_kernel"):
        yield Case(90, "float32", GRAM, kernel)
    for kernel in ("merge_kernel", "cross_kernel", "cross_squares_kernel", "gradient_kernel"):
        yield Case(90, "float32", SPLIT, kernel)
    for kernel in ("gram_kernel", "gradient_kernel", "loss_kernel"):
        yield Case(90, "bfloat16", LARGE_GRAM, kernel)
    if len(audit_triton.ARCHITECTURES) == 1:
        return
    launches = {
        GRAM: ("statistics_kernel", "combine_kernel", "finish_kernel"),
        LARGE_GRAM: ("combine_kernel",),
        SPLIT: ("statistics_kernel", "merge_kernel", "combine_kernel", "cross_squares_kernel"),
        LARGE: (),
    }
    for arch in audit_triton.ARCHITECTURES:
        for dtype in ("float32", "bfloat16", "float16"):
            for shape, others in launches.items():
                gram = shape[0] < shape[1]
                product = "gram_kernel" if gram else "cross_kernel"
                for kernel in (product, "gradient_kernel", *others):
                    yield Case(arch, dtype, shape, kernel)


CASES = list(dict.fromkeys(_cases()))


def launched(case: Case) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    import torch

    from vicreg_kernels.barlow.triton import launch as launchers
    from vicreg_kernels.core.triton import device as devices

    kernels: dict[str, Any] = {}
    kept = {name: getattr(launchers, name) for name in KERNELS}
    real = devices.device
    try:
        for name in KERNELS:
            setattr(launchers, name, Recorder(kept[name], kernels))
        devices.device = lambda index: devices.Device("default", 132, case.arch // 10)
        x, y = (
            torch.empty(case.shape, dtype=getattr(torch, case.dtype), device="meta")
            for _ in range(2)
        )
        settings = (1e-5, 0.0, False, 0.0051)
        _, *saved = launchers.forward(x, y, *settings)
        grad = torch.empty(1, device="meta")
        launchers.backward(grad, x, y, *saved, True, True, *settings)
    finally:
        devices.device = real
        for name, value in kept.items():
            setattr(launchers, name, value)
    return kernels[case.kernel]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case: Case, compiled: dict[str, Any]) -> None:
    kernel = compiled[str(case)]
    audit_triton.check("barlow", str(case), kernel)
    assert kernel["matrix"] == ([MATRIX[case.arch]] if case.kernel in PRODUCTS else [])
    if case.kernel != "loss_kernel":
        assert kernel["wide_loads"] > 0, "every load is narrower than 16 bytes"


if __name__ == "__main__":
    audit_triton.record("barlow", launched, CASES)
