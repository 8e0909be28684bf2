"""Tier 5: the tokens ops' Triton kernels compiled ahead of time: no
spills, registers and shared memory within the recorded budget, 16-byte loads where rows are moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.helpers import audit_triton
from tests.helpers.audit_triton import ARCHITECTURES, Recorder

KERNELS = (
    "gather_kernel",
    "map_kernel",
    "scatter_kernel",
    "sum_kernel",
    "loss_kernel",
    "finish_kernel",
    "gradient_kernel",
    "order_kernel",
    "assemble_kernel",
    "column_kernel",
    "column_finish_kernel",
)
# Kernels that move rows, which should do so 16 bytes at a time.
ROWS = {
    "gather_kernel", "scatter_kernel", "sum_kernel", "loss_kernel", "gradient_kernel",
    "assemble_kernel", "column_kernel",
}  # fmt: skip


class Case(NamedTuple):
    """A kernel of a launch. shape: batch, tokens, kept, D."""

    arch: int
    dtype: str
    shape: tuple[int, int, int, int]
    kernel: str
    packed: bool = False
    kind: int = 0

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        form = "packed" if self.packed else "dense"
        return f"sm_{self.arch}-{self.dtype}-{shape}-{form}-kind{self.kind}-{self.kernel}"


IJEPA, VJEPA, PREDICTOR = (128, 256, 176, 1280), (24, 1568, 1095, 1024), (24, 1568, 729, 384)


def _cases() -> Iterator[Case]:
    for arch in ARCHITECTURES:
        for kernel in KERNELS:
            yield Case(arch, "bfloat16", IJEPA, kernel)
        for kernel in ("loss_kernel", "gradient_kernel"):
            for kind in (1, 3):
                yield Case(arch, "bfloat16", VJEPA, kernel, packed=True, kind=kind)
            yield Case(arch, "float32", IJEPA, kernel)
        for kernel in ("gather_kernel", "order_kernel", "assemble_kernel"):
            yield Case(arch, "float32", PREDICTOR, kernel, packed=True)


CASES = list(_cases())


def launched(case: Case) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    import torch

    from vicreg_kernels.core.triton import device as devices
    from vicreg_kernels.tokens.triton import launch as launchers

    batch, tokens, kept, dim = case.shape
    dtype = getattr(torch, case.dtype)

    def floats(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int64, device="meta")

    rows = (batch * kept,) if case.packed else (batch, kept)
    offsets = integers(batch + 1) if case.packed else None
    index, x, pred = integers(*rows), floats(batch, tokens, dim), floats(*rows, dim)
    kernels: dict[str, Any] = {}
    replaced = {name: getattr(launchers, name) for name in KERNELS}
    real = devices.device
    try:
        for name in KERNELS:
            setattr(launchers, name, Recorder(replaced[name], kernels))
        devices.device = lambda index: devices.Device("default", 132, case.arch // 10)
        launchers.gather(x, index, offsets)
        for accumulate in (False, True):
            launchers.scatter(pred, index, offsets, batch, tokens, 0.0, accumulate, False)
        loss, saved = launchers.loss_forward(pred, x, index, offsets, case.kind, True, 1.0, 1e-5)
        launchers.loss_backward(loss, pred, x, index, offsets, saved, case.kind, True, 1.0)
        _, context, target = launchers.order(index, index, offsets, offsets)
        if case.packed:
            index, context, target, pred = (z[None] for z in (index, context, target, pred))
        table = floats(tokens, dim, dtype=torch.float32)
        token = floats(dim, dtype=torch.float32)
        made = launchers.assemble(pred, index, context, token, index, target, table)
        launchers.column_sum(made, target)
    finally:
        devices.device = real
        for name, value in replaced.items():
            setattr(launchers, name, value)
    return kernels[case.kernel]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case: Case, compiled: dict[str, Any]) -> None:
    kernel = compiled[str(case)]
    audit_triton.check("tokens", str(case), kernel)
    assert kernel["matrix"] == []
    if case.kernel in ROWS:
        assert kernel["wide_loads"] > 0, "every load is narrower than 16 bytes"


if __name__ == "__main__":
    audit_triton.record("tokens", launched, CASES)
