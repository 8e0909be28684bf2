"""Tier 5: the Triton kernels compiled ahead of time: no spills, registers and shared memory within
the recorded budget, accesses of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.helpers import audit_triton
from tests.helpers.audit_triton import ARCHITECTURES, Recorder

KERNELS = (
    "norm_kernel", "norm_gradient_kernel", "vectors_finish_kernel", "gate_kernel",
    "gate_gradient_kernel",
)  # fmt: skip


class Case(NamedTuple):
    """A kernel of a launch. dtypes: of tokens, of vectors; shape: frames, T, D."""

    arch: int
    dtypes: tuple[str, str]
    shape: tuple[int, int, int]
    kernel: str

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"sm_{self.arch}-{'-'.join(self.dtypes)}-{shape}-{self.kernel}"


# The tokens of a frame of LeWM's size, of DiT-XL/2, one token a frame, the longest.
FRAMES, DIT, SINGLE, LONGEST = (128, 196, 384), (32, 256, 1152), (4096, 1, 192), (64, 256, 4096)
HALF, FULL, MIXED = ("bfloat16",) * 2, ("float32",) * 2, ("bfloat16", "float32")


def _cases() -> Iterator[Case]:
    for arch in ARCHITECTURES:
        for kernel in KERNELS:
            yield Case(arch, HALF, FRAMES, kernel)
            yield Case(arch, FULL, DIT, kernel)
        for kernel in ("norm_kernel", "norm_gradient_kernel"):
            yield Case(arch, MIXED, SINGLE, kernel)
            yield Case(arch, FULL, LONGEST, kernel)


CASES = list(_cases())


def launched(case: Case) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    import torch

    from vicreg_kernels.adaln.triton import launch as launchers
    from vicreg_kernels.core.triton import device as devices

    def empty(*shape: int, of: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=getattr(torch, case.dtypes[of]), device="meta")

    x, vector = empty(*case.shape, of=0), empty(case.shape[0], case.shape[2], of=1)
    kernels: dict[str, Any] = {}
    replaced = {name: getattr(launchers, name) for name in KERNELS}
    real = devices.device
    try:
        for name in KERNELS:
            setattr(launchers, name, Recorder(replaced[name], kernels))
        devices.device = lambda index: devices.Device("default", 132, case.arch // 10)
        out, saved = launchers.norm_forward(x, vector, vector, 1e-6)
        launchers.norm_backward(out, x, vector, saved, True, True)
        launchers.gate_forward(x, x, vector)
        launchers.gate_backward(x, x, vector, True, True)
    finally:
        devices.device = real
        for name, value in replaced.items():
            setattr(launchers, name, value)
    return kernels[case.kernel]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case: Case, compiled: dict[str, Any]) -> None:
    kernel = compiled[str(case)]
    audit_triton.check("adaln", str(case), kernel)
    assert kernel["matrix"] == []
    if case.kernel != "vectors_finish_kernel":
        assert kernel["wide_loads"] > 0, "every load is narrower than 16 bytes"


if __name__ == "__main__":
    audit_triton.record("adaln", launched, CASES)
