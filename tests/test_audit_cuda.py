"""Tier 5: cuda.cu compiled by nvcc for sm_80, sm_90 and sm_100, and linked, without a GPU.

No spills; registers and shared memory within audit_budget_cuda.json; 16-byte accesses where meant;
nothing of torch's unstable C++ ABI. `python tests/test_audit_cuda.py --rewrite` records what nvcc
gives now as the new budget; tests never do.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build_emulator
import pytest
from build_emulator import DEFINES, TORCH, cached

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
BUDGET = Path(__file__).with_name("audit_budget_cuda.json")
# What two blocks of 256 threads a multiprocessor leave each thread.
MOST_REGISTERS = 128
FLAGS = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", *DEFINES, "-DUSE_CUDA"]
FLAGS += ["-isystem", f"{TORCH}/include", "-Icsrc"]


def nvcc() -> str:
    usual = Path("/usr/local/cuda/bin/nvcc")
    found = shutil.which("nvcc") or (str(usual) if usual.exists() else None)
    if found is None:
        pytest.skip("needs nvcc")
    return found


def release() -> str:
    text = subprocess.check_output([nvcc(), "--version"], text=True)
    return re.search(r"release ([\d.]+)", text).group(1)


def compiled(architecture: str) -> Path:
    """The object; ptxas's report lies beside it as .txt."""
    number = architecture.removeprefix("sm_")
    command = [nvcc(), *FLAGS, "-gencode", f"arch=compute_{number},code={architecture}"]
    command += ["-Xptxas", "-v", "-c", "csrc/vicreg/cuda.cu", "-o", "OUT"]
    return cached(f"cuda_{architecture}", ".o", [command], report=True)


@pytest.fixture(scope="module")
def objects() -> dict[str, Path]:
    nvcc()
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(compiled, ARCHITECTURES), strict=True))


def usage(report: Path) -> dict[str, dict[str, int]]:
    """For each kernel: registers, static shared memory and spilled bytes."""
    text = subprocess.check_output(["c++filt"], input=report.read_text(), text=True)
    found = {}
    for block in text.split("Compiling entry function '")[1:]:
        name = re.sub(r"\w+::", "", block.split("(")[0].removeprefix("void "))
        shared = re.search(r"(\d+) bytes smem", block)
        spills = re.findall(r"(\d+) bytes spill", block)
        found[name] = {
            "registers": int(re.search(r"Used (\d+) registers", block).group(1)),
            "shared": int(shared.group(1)) if shared else 0,
            "spilled": sum(map(int, spills)),
        }
        assert len(spills) == 2
    return dict(sorted(found.items()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills(objects, architecture):
    found = usage(objects[architecture].with_suffix(".txt"))
    assert len(found) == 31, sorted(found)
    for name, kernel in found.items():
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        assert kernel["registers"] <= MOST_REGISTERS, f"{name}: {kernel['registers']} registers"
        assert kernel["shared"] <= 48 * 1024


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_within_budget(objects, architecture):
    budget = json.loads(BUDGET.read_text())
    if budget["nvcc"] != release():
        pytest.skip(f"the budget is for nvcc {budget['nvcc']}, this is {release()}")
    found, allowed = usage(objects[architecture].with_suffix(".txt")), budget[architecture]
    assert found.keys() == allowed.keys()
    for name, kernel in found.items():
        for resource, limit in allowed[name].items():
            assert kernel[resource] <= limit, f"{name}: {kernel[resource]} {resource} > {limit}"


def test_vector_kernels_access_16_bytes():
    command = [nvcc(), *FLAGS, "-arch=compute_80", "-ptx", "csrc/vicreg/cuda.cu", "-o", "OUT"]
    text = subprocess.check_output(
        ["c++filt"], input=cached("cuda_ptx", ".ptx", [command]).read_text(), text=True
    )
    kernels = re.split(r"\.visible \.entry (?:void )?", text)[1:]
    seen = 0
    for kernel in kernels:
        name = kernel.split("(")[0]
        vectors = len(re.findall(r"ld\.global(?:\.nc)?\.v4\.", kernel))
        stores = len(re.findall(r"st\.global\.wb\.v[24]\.", kernel))  # 8 bytes of a half gradient
        if re.search(r"<\w+, true", name):
            seen += 1
            assert vectors > 0, name
            assert stores > 0 or "column_partials" in name, name
            assert not re.search(r"st\.global\.(u16|b16|v\d\.[bu]16)", kernel), name
        elif re.search(r"<\w+, false", name):
            assert vectors == stores == 0, name
    assert seen == 12


def test_links_against_the_stable_abi_alone(objects):
    names = ["-DVICREG_NAMESPACE=vicreg_kernels_cuda", "-DVICREG_KEY=CUDA", "-DUSE_CUDA"]
    register = [build_emulator.compiler(), "-O1", "-std=c++20", "-fPIC", "-fvisibility=hidden"]
    register += [*DEFINES, *names, "-isystem", f"{TORCH}/include", "-Icsrc"]
    commands = [
        [*register, "-c", "csrc/registration.cpp", "-o", "OBJECT_0"],
        [nvcc(), "-shared", "-cudart", "static", str(objects["sm_90"]), "OBJECT_0", "-o", "OUT"],
    ]
    library = cached("cuda_linked", ".so", commands)
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


def rewrite() -> None:
    budget: dict[str, object] = {"nvcc": release()}
    for architecture in ARCHITECTURES:
        found = usage(compiled(architecture).with_suffix(".txt"))
        budget[architecture] = {
            name: {key: kernel[key] for key in ("registers", "shared")}
            for name, kernel in found.items()
        }
    BUDGET.write_text(json.dumps(budget, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--rewrite"]:
        raise SystemExit("usage: python tests/test_audit_cuda.py --rewrite")
    rewrite()
