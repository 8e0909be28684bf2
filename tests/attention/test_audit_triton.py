"""Tier 5: the attention op's Triton kernels compiled ahead of time: no
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
    "forward_kernel",
    "delta_kernel",
    "key_gradient_kernel",
    "query_gradient_kernel",
    "rotate_kernel",
)
PRODUCTS = ("forward_kernel", "key_gradient_kernel", "query_gradient_kernel")


class Case(NamedTuple):
    """A kernel of a launch. rules: "dense", "ragged", "frames" or "blocks"; "-rope" turns too."""

    arch: int
    dtype: str
    head_dim: int
    tokens: int
    rules: str
    kernel: str

    def __str__(self) -> str:
        shape = f"{self.tokens}x{self.head_dim}"
        return f"sm_{self.arch}-{self.dtype}-{shape}-{self.rules}-{self.kernel}"


def _cases() -> Iterator[Case]:
    for kernel in PRODUCTS:
        for arch in ARCHITECTURES:
            yield Case(arch, "bfloat16", 64, 2048, "dense", kernel)
            yield Case(arch, "float32", 64, 300, "ragged-rope", kernel)
            yield Case(arch, "float32", 80, 300, "ragged-rope", kernel)
        yield Case(90, "bfloat16", 64, 69, "ragged-rope", kernel)
        yield Case(90, "bfloat16", 64, 1806, "frames-rope", kernel)
        yield Case(90, "bfloat16", 80, 512, "blocks-rope", kernel)
        yield Case(80, "bfloat16", 80, 69, "ragged-rope", kernel)
        yield Case(80, "bfloat16", 80, 256, "ragged-rope", kernel)
        yield Case(90, "float32", 128, 300, "dense", kernel)
        yield Case(100, "bfloat16", 64, 69, "dense", kernel)
        yield Case(100, "bfloat16", 128, 2048, "ragged-rope", kernel)
    yield Case(90, "float16", 128, 2048, "frames-rope", "forward_kernel")
    for arch, dtype in ((80, "float32"), (90, "bfloat16")):
        for kernel in ("rotate_kernel", "delta_kernel"):
            yield Case(arch, dtype, 80, 512, "dense-rope", kernel)


CASES = list(_cases())


def arguments(case: Case) -> tuple[Any, ...]:
    """q, k, v of 16 heads, packed as a projection's output is split, and rules and position."""
    import torch

    batch, heads = 8, 16
    ragged = case.rules.startswith("ragged")
    rows, tokens = (1, batch * case.tokens) if ragged else (batch, case.tokens)
    whole = torch.empty(
        rows, tokens, 3, heads, case.head_dim, dtype=getattr(torch, case.dtype), device="meta"
    )
    integers = lambda *shape: torch.empty(shape, dtype=torch.int32, device="meta")  # noqa: E731
    offsets = integers(batch + 1) if ragged else None
    bounds = integers(1, 5) if case.rules.startswith("blocks") else None
    frame = 258 if case.rules.startswith("frames") else 0
    table, grid = None, [1, 1, 1, 0]
    if case.rules.endswith("rope"):
        part = 2 * (case.head_dim // 3 // 2)
        table, grid = torch.empty(40, part, 2, device="meta"), [8, 16, 16, 3]
    rules = (offsets, offsets, None, None, bounds, case.tokens, case.tokens, frame, 0)
    return *whole.permute(2, 0, 3, 1, 4).unbind(), *rules, table, None, None, grid


def launched(case: Case) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from vicreg_kernels.attention.triton import launch as launchers
    from vicreg_kernels.core.triton import device as devices

    kernels: dict[str, Any] = {}
    kept = {name: getattr(launchers, name) for name in KERNELS}
    real = devices.device
    try:
        for name in KERNELS:
            setattr(launchers, name, Recorder(kept[name], kernels))
        devices.device = lambda index: devices.Device(
            "a GPU that is not in the table", 132, case.arch // 10
        )
        q, k, v, *rest = arguments(case)
        out, lse = launchers.forward(q, k, v, *rest, 0.125)
        need_q = case.kernel != "delta_kernel"
        launchers.backward(out, q, k, v, out, lse, *rest, need_q, True, True, 0.125)
    finally:
        devices.device = real
        for name, value in kept.items():
            setattr(launchers, name, value)
    return kernels[case.kernel]


def whole_groups(case: Case) -> bool:
    """Whether its operands leave room for a warp group's tiles: halves up to 96 columns."""
    return case.dtype != "float32" and case.head_dim <= 96


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case: Case, compiled: dict[str, Any]) -> None:
    kernel = compiled[str(case)]
    audit_triton.check("attention", str(case), kernel)
    # Tiles of fewer than 64 rows, which are what float32 leaves room for, take sm_80's instruction.
    wanted = {MATRIX[case.arch]} if whole_groups(case) else {MATRIX[case.arch], MATRIX[80]}
    assert (set(kernel["matrix"]) <= wanted) if case.kernel in PRODUCTS else not kernel["matrix"]
    assert bool(kernel["matrix"]) == (case.kernel in PRODUCTS)
    assert kernel["wide_loads"] > 0, "every load is narrower than 16 bytes"


def test_every_shipped_shape_can_be_launched() -> None:
    """Each row of the table is the nearest to its own shape; other shapes and GPUs find one too."""
    from vicreg_kernels.attention.triton import configs

    majors = {"default": 9, "sm_100": 10, "sm_80": 8}
    for device, family, (head_dim, tokens), config in configs.shipped():
        operands = "fp32" if family == "single" else "bf16"
        assert configs.nearest("", majors[device], operands, head_dim, tokens) == config
    for head_dim in range(16, 129, 8):
        for major in (7, 8, 9, 10, 12):
            for operands in ("fp32", "tf32", "fp16", "bf16"):
                nearest = configs.nearest("", major, operands, head_dim, 100)
                assert min(nearest.forward[:2]) >= 16
    assert configs.nearest("", 12, "bf16", 64, 0) == configs.nearest("", 8, "fp16", 16, 64)


def test_parts_of_a_head() -> None:
    triton = pytest.importorskip("triton")
    from vicreg_kernels.attention.triton.tiles import parts

    for dim in range(16, 129, 8):
        first, second = parts(dim)
        assert dim <= first + second <= triton.next_power_of_2(dim)
        assert parts(dim, "fp32") == (triton.next_power_of_2(dim), 0)
    assert [parts(d) for d in (40, 56, 64, 80, 88, 104)] == [
        (32, 16), (64, 0), (64, 0), (64, 16), (64, 32), (128, 0),
    ]  # fmt: skip


if __name__ == "__main__":
    audit_triton.record("attention", launched, CASES)
