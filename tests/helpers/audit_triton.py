"""What the audits of the ops' Triton kernels share: ahead-of-time compilation without a GPU, for
sm_90, and with VICREG_KERNELS_AUDIT=all, as in `make audit`, for sm_80, sm_90 and sm_100.

What is compiled is what the launchers would launch: they run on meta tensors while their kernels
are replaced by recorders, and arguments are specialised as Triton specialises them. A test file
lists its cases, NamedTuples with an `arch`, and gives `launched(case)`, which returns
(kernel, args, options) of the launch to compile. `VICREG_KERNELS_AUDIT=all python -m
tests.<op>.test_audit_triton --record` rewrites budgets/<op>_triton.json, which holds for the Triton
it names; tests never write it. Its "spills" is written by hand: version of Triton -> case -> bytes
that a thread spills there, which no small change of the kernel mended; all else spills nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

BUDGETS = Path(__file__).resolve().parents[1] / "budgets"
# Shared memory that every GPU from sm_80 on gives one block (sm_86, sm_89 and sm_120: 99 KiB).
SHARED_LIMIT = 99 * 1024
# The same of sm_90 and sm_100, for kernels that are launched there alone.
LARGE_SHARED_LIMIT = 227 * 1024
# The matrix instruction of each architecture.
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
ARCHITECTURES = tuple(MATRIX) if os.environ.get("VICREG_KERNELS_AUDIT") == "all" else (90,)

Launched = Callable[[Any], tuple[Any, tuple[Any, ...], dict[str, Any]]]


class Recorder:
    """Stands in for a kernel and keeps the arguments of its last launch, by the kernel's name."""

    def __init__(self, kernel: Any, launches: dict[str, Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            assert 0 < grid[0] < 2**31, grid
            self.launches[self.kernel.__name__] = (self.kernel, args, options)

        return launch


def specialise(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict]:
    """What Triton's launcher would compile: 1 is a constant, a multiple of 16 is marked, but not
    of what the kernel does not specialise on; a tuple is one of floats.
    """
    import torch
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    types = {
        torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16",
        torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8",
    }  # fmt: skip
    names = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
    options = {k: keywords.pop(k) for k in names if k in keywords}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **keywords}
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        special = not parameter.do_not_specialize
        aligned = special and not parameter.do_not_specialize_on_alignment
        if name in keywords or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = types[value.dtype]
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{types[value.base.dtype][1:]}[{block}]>"
            aligned = False
        elif isinstance(value, tuple):
            signature[name], aligned = ("fp32",) * len(value), False
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            fits = "i32" if -(2**31) <= value < 2**31 else "i64"
            signature[name] = parameter.annotation_type or fits
            aligned = aligned and value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def compile_case(launched: Launched, case: Any) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, args, keywords = launched(case)
    source, options = specialise(kernel, args, dict(keywords))
    made = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command[1] = "--dump-sass"
        sass = subprocess.run(command, capture_output=True, text=True).stdout
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
        "tma_loads": len(re.findall(r"cp\.async\.bulk\.tensor[\w.:]*\.shared[\w:]*\.global", ptx)),
        "tma_stores": len(re.findall(r"cp\.async\.bulk\.tensor[\w.:]*\.global\.shared", ptx)),
        "wide_loads": len(re.findall(wide, ptx)),
        "wide_stores": len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx)),
        # fused multiply-adds; None where the disassembler is missing
        "fused": len(re.findall(r"\bFFMA\b", sass)) if sass else None,
    }


def _quietly(launched: Launched, case: Any) -> dict[str, Any]:
    try:
        return compile_case(launched, case)
    except Exception as error:  # reported by the test of this case alone
        return {"error": f"{type(error).__name__}: {error}"}


def compile_all(launched: Launched, cases: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Every case by its name, in two processes that make GPU kernels whatever this one does."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            kernels = pool.map(partial(_quietly, launched), cases)
            return dict(zip(map(str, cases), kernels, strict=True))
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def check(op: str, name: str, kernel: dict[str, Any], shared_limit: int = SHARED_LIMIT) -> None:
    """It compiled, without spills but for known ones, within its budget. shared_limit: bytes a
    block may have.
    """
    import triton

    file = BUDGETS / f"{op}_triton.json"
    command = f"VICREG_KERNELS_AUDIT=all python -m tests.{op}.test_audit_triton --record"
    assert file.exists(), f"no {file.name}; `{command}` records it"
    budget = json.loads(file.read_text())
    assert name in budget["cases"], f"the budget has no such case; `{command}` records it"
    assert "error" not in kernel, kernel["error"]
    known = budget.get("spills", {}).get(triton.__version__, {}).get(name, 0)
    assert kernel["spilled"] <= known, f"{kernel['spilled']} bytes a thread spilled, known: {known}"
    assert kernel["shared"] <= shared_limit
    if triton.__version__ == budget["triton"]:  # another compiler allocates otherwise
        for resource, allowed in budget["cases"][name].items():
            assert kernel[resource] <= allowed, f"{resource}: {kernel[resource]}, budget {allowed}"


def record(op: str, launched: Launched, cases: Sequence[Any]) -> None:
    """What a test file does when it is run with --record."""
    import triton

    if sys.argv[1:] != ["--record"]:
        sys.exit(f"usage: VICREG_KERNELS_AUDIT=all python {sys.argv[0]} --record")
    if len(ARCHITECTURES) < len(MATRIX):
        sys.exit("the budget is of every architecture: set VICREG_KERNELS_AUDIT=all")
    kernels = compile_all(launched, cases)
    for name, result in kernels.items():
        assert "error" not in result, (name, result)
        print(name, result)
    file = BUDGETS / f"{op}_triton.json"
    spills = json.loads(file.read_text()).get("spills") if file.exists() else None
    kept = {
        name: {k: result[k] for k in ("registers", "shared")} for name, result in kernels.items()
    }
    budget = {"triton": triton.__version__, **({"spills": spills} if spills else {}), "cases": kept}
    file.write_text(json.dumps(budget, indent=1) + "\n")
