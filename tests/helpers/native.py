"""Compiles the test builds of an op's C++ side: cuda.cu under the emulator, with and without
sanitizers, cpu.cpp with sanitizers, and the emulator's own selftest. Results are kept in .cache
under a hash of the sources and the flags.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
TORCH = Path(torch.__file__).parent
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE += ["-fno-omit-frame-pointer"]


def compiler() -> str:
    path = shutil.which(os.environ.get("CXX") or "g++")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("g++ must be there")
        pytest.skip("needs g++")
    return path


def key(op: str, *parts: str) -> str:
    """A hash of the C++ sources that op's builds see, of torch's version and of `parts`."""
    total = hashlib.sha256("\0".join((torch.__version__, *parts)).encode())
    folders = [ROOT / "csrc" / name for name in {op, "common", "emulator"}]
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def cached(
    op: str, name: str, suffix: str, commands: list[list[str]], report: bool = False
) -> Path:
    """The file that the last of `commands` writes to OUT; they run in order, OBJECT_0 and so on
    standing for scratch objects. With `report`, what the last one prints lies beside it as .txt.
    """
    name = f"{op}_{name}"
    target = CACHE / f"{name}_{key(op, str(commands))}{suffix}"
    if target.exists():
        return target
    CACHE.mkdir(exist_ok=True)
    for stale in CACHE.glob(f"{name}_*"):
        stale.unlink(missing_ok=True)
    scratch = CACHE / f"{target.name}.{os.getpid()}"
    names = {"OUT": str(scratch)} | {f"OBJECT_{i}": f"{scratch}.{i}.o" for i in range(4)}
    for command in commands:
        done = subprocess.run(
            [names.get(word, word) for word in command], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-6000:]
    if report:
        target.with_suffix(".txt").write_text(done.stdout + done.stderr)
    scratch.rename(target)
    for path in names.values():
        Path(path).unlink(missing_ok=True)
    return target


def selftest(sanitize: bool = False) -> Path:
    flags = [*FLAGS, *(SANITIZE if sanitize else [])]
    command = [compiler(), *flags, "-Icsrc/emulator", "-Icsrc", "csrc/emulator/selftest.cpp"]
    command += ["-o", "OUT"]
    return cached("emulator", "sanitized" if sanitize else "plain", "", [command])


def emulated(op: str, *flags: str, sanitize: bool = False) -> Path:
    """op's CUDA side as ops vicreg_kernels_emulator::* on CPU tensors."""
    emulator = ["-x", "c++", *flags, "-Icsrc/emulator"]
    name = "emulated_sanitized" if sanitize else "emulated_plain"
    return _library(op, name, "vicreg_kernels_emulator", "cuda.cu", emulator, sanitize)


def sanitized(op: str) -> Path:
    """op's CPU side under ASan and UBSan, as ops vicreg_kernels_sanitized::*."""
    return _library(op, "cpu_sanitized", "vicreg_kernels_sanitized", "cpu.cpp", [], True)


def _library(
    op: str, name: str, namespace: str, source: str, extra: list[str], sanitize: bool
) -> Path:
    flags = [*FLAGS, *DEFINES, *(SANITIZE if sanitize else []), "-isystem", f"{TORCH}/include"]
    names = [f"-DKERNELS_NAMESPACE={namespace}", "-DKERNELS_KEY=CPU"]
    compile_ = [compiler(), *flags, *names, "-Icsrc"]
    link = [f"-L{TORCH}/lib", "-ltorch_cpu"]
    commands = [
        [*compile_, *extra, "-c", f"csrc/{op}/{source}", "-o", "OBJECT_0"],
        [*compile_, "-c", f"csrc/{op}/registration.cpp", "-o", "OBJECT_1"],
        [compiler(), *flags, "-shared", "OBJECT_0", "OBJECT_1", *link, "-o", "OUT"],
    ]
    return cached(op, name, ".so", commands)


def shortened(z: torch.Tensor) -> torch.Tensor:
    """z with four bytes less memory than its shape says, which no check of shapes can see."""
    memory = z.untyped_storage()
    memory.resize_(memory.nbytes() - 4)
    return z


def sanitizer_environment() -> dict[str, str]:
    """What a process needs in its environment for a sanitized library: the sanitizer must be the
    first library loaded.
    """
    libraries = [
        subprocess.check_output([compiler(), f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    # torch and Python keep memory until the process ends
    return {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def run_sanitized(program: str, library: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`program` (Python source; its arguments are the library and `words`) in a process of its
    own.
    """
    return subprocess.run(
        [sys.executable, "-c", program, str(library), *words],
        env={**os.environ, **sanitizer_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def run_sanitized_build(
    op: str, build: str, program: str, mode: str
) -> subprocess.CompletedProcess[str]:
    """`program` on an op's sanitized build: "cpu", or "cuda", its kernels in the emulator."""
    if build == "cpu":
        return run_sanitized(program, sanitized(op), "vicreg_kernels_sanitized", mode)
    return run_sanitized(program, emulated(op, sanitize=True), "vicreg_kernels_emulator", mode)
