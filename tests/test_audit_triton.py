"""Tier 5: every Triton kernel compiled ahead of time for sm_80, sm_90 and sm_100, without a GPU.

What is compiled is what the launchers would launch: they run on meta tensors while their kernels
are replaced by recorders, and arguments are specialised as Triton specialises them. Checked: no
spills, registers and shared memory within the recorded budget, tensor-core instructions and
16-byte loads where meant.

`python tests/test_audit_triton.py --record` rewrites audit_budget_triton.json, which holds for the
Triton it names; the tests never write it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

BUDGET = Path(__file__).with_name("audit_budget_triton.json")
# Shared memory that every GPU from sm_80 on gives one block (sm_86, sm_89 and sm_120: 99 KiB).
SHARED_LIMIT = 99 * 1024
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

KERNELS = (
    "statistics_kernel",
    "merge_kernel",
    "product_kernel",
    "strips_kernel",
    "terms_kernel",
    "gradient_kernel",
)
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
    for arch in MATRIX:
        for kernel in KERNELS:
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
        for kernel in products:
            yield Case(90, "bfloat16", shape, kernel)
    for kernel in products:
        yield Case(90, "float32", GRAM, kernel, "columns")
        yield Case(90, "float32", (3, 5, 1), kernel, "one")


CASES = list(_cases())


class Recorder:
    """Stands in for a kernel and keeps the arguments it is launched with."""

    def __init__(self, kernel: Any, launches: dict[str, Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            assert 0 < grid[0] < 2**31, grid
            self.launches[self.kernel.__name__] = (self.kernel, args, options)

        return launch


def launches(case: Case) -> dict[str, Any]:
    import torch

    from vicreg_kernels.vicreg import triton as launchers

    groups, rows, dim = case.shape
    dtype = getattr(torch, case.dtype)

    def view() -> torch.Tensor:
        if case.layout == "columns":
            return torch.empty(groups, dim, rows, dtype=dtype, device="meta").mT
        return torch.empty(groups, rows, dim, dtype=dtype, device="meta")

    found: dict[str, Any] = {}
    kept = {name: getattr(launchers, name) for name in (*KERNELS, "_device")}
    try:
        for name in KERNELS:
            setattr(launchers, name, Recorder(kept[name], found))
        launchers._device = lambda index: ("default", 132, case.arch // 10)
        x, y = view(), None if case.layout == "one" else view()
        settings = (1.0, 1e-4, True, [1.0, 0.5, 0.1], [25.0, 25.0, 1.0])
        _, *saved = launchers.forward(x, y, *settings)
        grads = torch.empty(1 if y is not None else 4, device="meta")
        launchers.backward(grads, x, y, *saved, True, y is not None, *settings)
    finally:
        for name, value in kept.items():
            setattr(launchers, name, value)
    return found


def specialise(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict]:
    """What Triton's launcher would compile: 1 is a constant, a multiple of 16 is marked."""
    import torch
    from triton.compiler import ASTSource

    types = {
        torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16",
        torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
    }  # fmt: skip
    options = {k: keywords.pop(k) for k in ("num_warps", "num_stages") if k in keywords}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **keywords}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        aligned = True
        if name in keywords or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = types[value.dtype]
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def compile_case(case: Case) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, args, keywords = launches(case)[case.kernel]
    source, options = specialise(kernel, args, dict(keywords))
    made = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"\b{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK", "LOCAL")
    )
    ptx = made.asm["ptx"]
    wide = r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v8\.b16|cp\.async\.cg[\w.:]*"
    return {
        "registers": registers,
        "shared": made.metadata.shared,
        "spilled": stack + local,
        "matrix": sorted(name for name in MATRIX.values() if name in ptx),
        "wide_loads": len(re.findall(wide, ptx)),
    }


def _quietly(case: Case) -> dict[str, Any]:
    try:
        return compile_case(case)
    except Exception as error:  # reported by the test of this case alone
        return {"error": f"{type(error).__name__}: {error}"}


def compile_all() -> dict[str, dict[str, Any]]:
    """Every case, in two processes that make GPU kernels whatever this one does."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            return dict(zip(map(str, CASES), pool.map(_quietly, CASES), strict=True))
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton")
    return compile_all()


@pytest.fixture(scope="module")
def budget() -> dict[str, Any]:
    return json.loads(BUDGET.read_text())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case: Case, compiled: dict[str, Any], budget: dict[str, Any]) -> None:
    import triton

    found = compiled[str(case)]
    assert "error" not in found, found["error"]
    assert found["spilled"] == 0, f"{found['spilled']} bytes a thread"
    assert found["shared"] <= SHARED_LIMIT
    if triton.__version__ == budget["triton"]:  # another compiler allocates otherwise
        for resource, allowed in budget["cases"][str(case)].items():
            assert found[resource] <= allowed, f"{resource}: {found[resource]}, budget {allowed}"
    if case.kernel in ("product_kernel", "gradient_kernel"):
        assert found["matrix"] == [MATRIX[case.arch]]
    else:
        assert found["matrix"] == []
    if case.shape[-1] > 1 and case.kernel not in ("terms_kernel",):
        assert found["wide_loads"] > 0, "every load is narrower than 16 bytes"


def test_every_shipped_shape_can_be_launched() -> None:
    """Each row of the table is the nearest to its own shape; other shapes and GPUs find one too."""
    from vicreg_kernels.vicreg import configs

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


def _record() -> None:
    import triton

    found = compile_all()
    for name, result in found.items():
        assert "error" not in result, (name, result)
    cases = {
        name: {k: result[k] for k in ("registers", "shared")} for name, result in found.items()
    }
    BUDGET.write_text(json.dumps({"triton": triton.__version__, "cases": cases}, indent=1) + "\n")
    for name, result in found.items():
        print(name, result)


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit("usage: python tests/test_audit_triton.py --record")
    _record()
