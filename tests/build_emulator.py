"""Compiles what the emulator runs: csrc/emulator/selftest.cpp, and the CUDA side of the ops as a
library on CPU tensors. Results are kept in .cache under a hash of the sources and the flags.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"
TORCH = Path(torch.__file__).parent
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE += ["-fno-omit-frame-pointer"]


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX") or "g++")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("g++ must be there")
        pytest.skip("needs g++")
    return found


def key(*parts: str) -> str:
    """A hash of every C++ source, of torch's version and of `parts`."""
    total = hashlib.sha256("\0".join((torch.__version__, *parts)).encode())
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def cached(name: str, suffix: str, commands: list[list[str]], report: bool = False) -> Path:
    """The file that the last of `commands` writes to OUT; they run in order, OBJECT_0 and so on
    standing for scratch objects. With `report`, what the last one prints lies beside it as .txt.
    """
    target = CACHE / f"{name}_{key(str(commands))}{suffix}"
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
    command = [compiler(), *flags, "-Icsrc/emulator", "csrc/emulator/selftest.cpp", "-o", "OUT"]
    return cached("selftest_sanitized" if sanitize else "selftest_plain", "", [command])


def library(sanitize: bool = False) -> Path:
    """The ops vicreg_kernels_emulator::*, whose half products come in small pieces."""
    flags = [*FLAGS, *DEFINES, *(SANITIZE if sanitize else []), "-isystem", f"{TORCH}/include"]
    kernels = ["-x", "c++", "-DVICREG_PRODUCT_ELEMENTS=512", "-Icsrc/emulator", "-Icsrc"]
    names = ["-DVICREG_NAMESPACE=vicreg_kernels_emulator", "-DVICREG_KEY=CPU", "-Icsrc"]
    link = [f"-L{TORCH}/lib", "-ltorch_cpu"]
    commands = [
        [compiler(), *flags, *kernels, "-c", "csrc/vicreg/cuda.cu", "-o", "OBJECT_0"],
        [compiler(), *flags, *names, "-c", "csrc/registration.cpp", "-o", "OBJECT_1"],
        [compiler(), *flags, "-shared", "OBJECT_0", "OBJECT_1", *link, "-o", "OUT"],
    ]
    return cached("emulator_sanitized" if sanitize else "emulator_plain", ".so", commands)
