"""Tier 5: the VICReg op's Triton kernels compiled ahead of time: no
spills, registers and shared memory within the recorded budget, tensor-core instructions and
16-byte loads where meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.helpers import audit_triton
from tests.helpers.audit_triton import ARCHITECTURES, MATRIX, Recorder

# Minutes of compiling.

KERNELS = (
    "statistics_kernel",
    "merge_kernel",
    "product_kernel",
    "strips_kernel",
    "terms_kernel",
    "gradient_kernel",
    "centre_kernel",
    "symmetric_kernel",
    "tiled_gradient_kernel",
)
TMA = ("symmetric_kernel", "tiled_gradient_kernel")
PRODUCTS = ("product_kernel", "gradient_kernel", *TMA)
GRAM, LARGE_GRAM, SPLIT, WHOLE, LARGE = (
    (1, 64, 8192),
    (1, 2048, 8192),
    (1, 16384, 384),
    (49, 512, 512),
    (1, 8192, 4096),
)


class Case(NamedTuple):
    """A kernel of a launch. layout: a view's "rows" or "columns" are contiguous, or "one" view."""

    arch: int
    dtype: str
    shape: tuple[int, int, int]
    kernel: str
    layout: str = "rows"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"sm_{self.arch}-{self.dtype}-{shape}-{self.layout}-{self.kernel}"


def _cases() -> Iterator[Case]:
    products = ("product_kernel", "gradient_kernel")
    for arch in ARCHITECTURES:
        for kernel in KERNELS[:6]:
            if kernel != "merge_kernel":
                yield Case(arch, "float32", GRAM, kernel)
            if kernel != "terms_kernel":
                yield Case(arch, "float32", SPLIT, kernel)
        for dtype in ("bfloat16", "float16"):
            for kernel in ("statistics_kernel", *products):
                yield Case(arch, dtype, GRAM, kernel)
            for kernel in products:
                yield Case(arch, dtype, WHOLE, kernel)
        yield Case(arch, "float32", LARGE_GRAM, "product_kernel")
        yield Case(arch, "float32", LARGE, "gradient_kernel")
        for shape in (LARGE_GRAM, LARGE):
            if arch == 80:
                for kernel in products:
                    yield Case(arch, "bfloat16", shape, kernel)
            else:
                for kernel in ("centre_kernel", *TMA):
                    yield Case(arch, "bfloat16", shape, kernel)
                yield Case(arch, "float16", shape, "symmetric_kernel")
        if arch >= 90:
            yield Case(arch, "bfloat16", LARGE_GRAM, "strips_kernel")
            yield Case(arch, "float16", LARGE, "gradient_kernel")
    for kernel in products:
        yield Case(90, "float32", GRAM, kernel, "columns")
        yield Case(90, "float32", (3, 5, 1), kernel, "one")


CASES = list(_cases())


def launched(case: Case) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    import torch

    from vicreg_kernels.core.triton import device as devices
    from vicreg_kernels.vicreg.triton import launch as launchers

    groups, rows, dim = case.shape
    dtype = getattr(torch, case.dtype)

    def view() -> torch.Tensor:
        if case.layout == "columns":
            return torch.empty(groups, dim, rows, dtype=dtype, device="meta").mT
        return torch.empty(groups, rows, dim, dtype=dtype, device="meta")

    kernels: dict[str, Any] = {}
    kept = {name: getattr(launchers, name) for name in KERNELS}
    real = devices.device
    try:
        for name in KERNELS:
            setattr(launchers, name, Recorder(kept[name], kernels))
        devices.device = lambda index: devices.Device("default", 132, case.arch // 10)
        x, y = view(), None if case.layout == "one" else view()
        settings = (1.0, 1e-4, True, [1.0, 0.5, 0.1], [25.0, 25.0, 1.0])
        _, *saved = launchers.forward(x, y, *settings)
        grads = torch.empty(1 if y is not None else 4, device="meta")
        launchers.backward(grads, x, y, *saved, True, y is not None, *settings)
    finally:
        devices.device = real
        for name, value in kept.items():
            setattr(launchers, name, value)
    return kernels[case.kernel]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case: Case, compiled: dict[str, Any]) -> None:
    kernel = compiled[str(case)]
    # Two blocks of the TMA products share a multiprocessor: one computes while the other stores.
    limit = (
        audit_triton.LARGE_SHARED_LIMIT // 2 if case.kernel in TMA else audit_triton.SHARED_LIMIT
    )
    audit_triton.check("vicreg", str(case), kernel, limit)
    assert (kernel["tma_loads"] > 0) == (case.kernel in TMA)
    assert (kernel["tma_stores"] > 0) == (case.kernel == "symmetric_kernel")
    if case.kernel in PRODUCTS:
        assert kernel["matrix"] == [MATRIX[case.arch]]
    else:
        assert kernel["matrix"] == []
    if case.shape[-1] > 1 and case.kernel not in ("terms_kernel", "symmetric_kernel"):
        assert kernel["wide_loads"] > 0, "every load is narrower than 16 bytes"


def test_every_shipped_shape_can_be_launched() -> None:
    """Each row of the table is the nearest to its own shape; other shapes and GPUs find one too."""
    from vicreg_kernels.vicreg.triton import configs

    for device, family, (rows, dim), config in configs.shipped():
        assert (
            configs.nearest(device, "fp32" if family == "single" else "bf16", rows, dim) == config
        )
    assert configs.nearest("a GPU that is not in the table", "fp16", 70, 8000) == configs.nearest(
        "default", "bf16", 64, 8192
    )
    assert configs.nearest("default", "fp32", 3000, 2999) == configs.nearest(
        "default", "fp32", 8192, 4096
    )


if __name__ == "__main__":
    audit_triton.record("vicreg", launched, CASES)
