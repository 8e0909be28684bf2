"""What the audits of the ops' cuda.cu share: nvcc without a GPU, for sm_90, and with
VICREG_KERNELS_AUDIT=all, as in `make audit`, for sm_80, sm_90 and sm_100.

A test file names its op; `check_*` hold the op's kernels to what every op promises: no spills,
registers and shared memory within budgets/<op>_cuda.json, nothing of torch's unstable C++
ABI. `VICREG_KERNELS_AUDIT=all python -m tests.helpers.audit_cuda OP ...` records what nvcc gives
now as the new budget; tests never do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import native
from tests.helpers.native import DEFINES, TORCH, cached

EVERY = ("sm_80", "sm_90", "sm_100")
ARCHITECTURES = EVERY if os.environ.get("VICREG_KERNELS_AUDIT") == "all" else ("sm_90",)
BUDGETS = Path(__file__).resolve().parents[1] / "budgets"
FLAGS = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", *DEFINES, "-DUSE_CUDA"]
FLAGS += ["-isystem", f"{TORCH}/include", "-Icsrc"]

Usage = dict[str, dict[str, int]]


def nvcc() -> str:
    usual = Path("/usr/local/cuda/bin/nvcc")
    path = shutil.which("nvcc") or (str(usual) if usual.exists() else None)
    if path is None:
        pytest.skip("needs nvcc")
    return path


def release() -> str:
    text = subprocess.check_output([nvcc(), "--version"], text=True)
    return re.search(r"release ([\d.]+)", text).group(1)


def compiled(op: str) -> Path:
    """The object for ARCHITECTURES; ptxas's report lies beside it as .txt."""
    command = [nvcc(), *FLAGS, "--threads", "2", "-Xptxas", "-v"]
    for architecture in ARCHITECTURES:
        number = architecture.removeprefix("sm_")
        command += ["-gencode", f"arch=compute_{number},code={architecture}"]
    command += ["-c", f"csrc/{op}/cuda.cu", "-o", "OUT"]
    return cached(op, "cuda_object", ".o", [command], report=True)


def ptx(op: str, architecture: str = "compute_80") -> str:
    """Demangled."""
    command = [nvcc(), *FLAGS, f"-arch={architecture}", "-ptx", f"csrc/{op}/cuda.cu", "-o", "OUT"]
    text = cached(op, f"cuda_{architecture}", ".ptx", [command]).read_text()
    return subprocess.check_output(["c++filt"], input=text, text=True)


def usage(op: str) -> dict[str, Usage]:
    """By architecture and kernel: registers, static shared memory and spilled bytes."""
    report = compiled(op).with_suffix(".txt").read_text()
    text = subprocess.check_output(["c++filt"], input=report, text=True)
    usages: dict[str, Usage] = {name: {} for name in ARCHITECTURES}
    for block in text.split("Compiling entry function '")[1:]:
        name = re.sub(r"\w+::", "", block.split("(")[0].removeprefix("void "))
        architecture = re.search(r"' for '(sm_\d+)", block).group(1)
        shared = re.search(r"(\d+) bytes smem", block)
        spills = re.findall(r"(\d+) bytes spill", block)
        assert len(spills) == 2
        usages[architecture][name] = {
            "registers": int(re.search(r"Used (\d+) registers", block).group(1)),
            "shared": int(shared.group(1)) if shared else 0,
            "spilled": sum(map(int, spills)),
        }
    return {name: dict(sorted(kernels.items())) for name, kernels in usages.items()}


def check_no_spills(op: str, architecture: str, count: int, most_registers: int = 128) -> None:
    """count: how many kernels there are. 128 registers leave two blocks of 256 threads."""
    kernels = usage(op)[architecture]
    assert len(kernels) == count, sorted(kernels)
    for name, kernel in kernels.items():
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        assert kernel["registers"] <= most_registers, f"{name}: {kernel['registers']} registers"
        assert kernel["shared"] <= 48 * 1024


def check_within_budget(op: str, architecture: str) -> None:
    file = BUDGETS / f"{op}_cuda.json"
    command = f"VICREG_KERNELS_AUDIT=all python -m tests.helpers.audit_cuda {op}"
    assert file.exists(), f"no {file.name}; `{command}` records it"
    budget = json.loads(file.read_text())
    if budget["nvcc"] != release():
        pytest.skip(f"the budget is for nvcc {budget['nvcc']}, this is {release()}")
    used, allowed = usage(op)[architecture], budget[architecture]
    assert used.keys() == allowed.keys()
    for name, kernel in used.items():
        for resource, limit in allowed[name].items():
            assert kernel[resource] <= limit, f"{name}: {kernel[resource]} {resource} > {limit}"


def check_links_against_the_stable_abi_alone(op: str) -> None:
    names = ["-DKERNELS_NAMESPACE=vicreg_kernels_cuda", "-DKERNELS_KEY=CUDA", "-DUSE_CUDA"]
    register = [native.compiler(), "-O1", "-std=c++20", "-fPIC", "-fvisibility=hidden"]
    register += [*DEFINES, *names, "-isystem", f"{TORCH}/include", "-Icsrc"]
    commands = [
        [*register, "-c", f"csrc/{op}/registration.cpp", "-o", "OBJECT_0"],
        [nvcc(), "-shared", "-cudart", "static", str(compiled(op)), "OBJECT_0", "-o", "OUT"],
    ]
    library = cached(op, "cuda_linked", ".so", commands)
    lines = subprocess.check_output(["nm", "-D", "--undefined-only", str(library)], text=True)
    symbols = [line.split()[-1] for line in lines.splitlines()]
    system = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
    optional = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    torch_symbols = [s for s in symbols if not system.match(s) and s not in optional]
    assert "aoti_torch_get_current_cuda_stream" in torch_symbols
    strangers = [s for s in torch_symbols if not re.match(r"(aoti_torch|torch)_\w+$", s)]
    assert not strangers
    demangled = subprocess.check_output(["c++filt"], input="\n".join(symbols), text=True)
    assert not re.search(r"\b(c10|at|caffe2)::", demangled)


def record(op: str) -> None:
    budget: dict[str, object] = {"nvcc": release()}
    for architecture, kernels in usage(op).items():
        budget[architecture] = {
            name: {key: kernel[key] for key in ("registers", "shared")}
            for name, kernel in kernels.items()
        }
    (BUDGETS / f"{op}_cuda.json").write_text(json.dumps(budget, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(
            "usage: VICREG_KERNELS_AUDIT=all python -m tests.helpers.audit_cuda OP ..."
        )
    if ARCHITECTURES != EVERY:
        raise SystemExit("the budget is of every architecture: set VICREG_KERNELS_AUDIT=all")
    for named in sys.argv[1:]:
        record(named)
