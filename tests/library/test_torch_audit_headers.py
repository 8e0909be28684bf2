"""Tier 5: every C++ and CUDA source compiled against the headers of every supported torch, and held
to the C functions that the oldest of them declares.

The headers are those of torch's wheel for another platform, which is small (80 to 110 MB, against
gigabytes on Linux) and carries the same ones. They are kept in .cache; where they are neither there
nor to be downloaded, the check says so and is skipped.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import native
from tests.helpers.audit_cuda import nvcc

OLDEST = "2.11.0"
SUPPORTED = (OLDEST, "2.12.0", "2.13.0")
OPS = sorted(path.parent.name for path in (native.ROOT / "csrc").glob("*/registration.cpp"))
# What the loader needs of the system is not torch's.
DECLARED = re.compile(r"\b((?:aoti_torch|torch)_\w+)\s*\(")


@cache
def headers(version: str) -> Path:
    """The include directory of that torch, or a skip that says why there is none."""
    folder = native.CACHE / "torch_headers" / version
    include = folder / "torch" / "include"
    if include.is_dir():
        return include
    scratch = folder.with_suffix(".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    for platform in ("macosx_14_0_arm64", "macosx_11_0_arm64"):
        command += ["--platform", platform]
    command += ["--python-version", "3.11", "-d", str(scratch), f"torch=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("torch-*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip downloaded nothing"])[-1]
        pytest.skip(f"the headers of torch {version} are not here: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("torch/include/")]
        wheel.extractall(scratch, names)
    wheels[0].unlink()
    scratch.rename(folder)
    return include


def declared(include: Path) -> set[str]:
    """The C functions of torch's stable ABI that these headers declare."""
    files = [include / "torch/csrc/stable/c/shim.h"]
    for folder in ("c", "generated"):
        files += (include / "torch/csrc/inductor/aoti_torch" / folder).glob("*.h")
    return {name for file in files for name in DECLARED.findall(file.read_text())}


def objects(op: str, version: str, scratch: Path, library: str) -> list[Path]:
    """The objects of an op's half of a library; unoptimised, for what is asked is that they do
    compile."""
    include = headers(version)
    cuda = library == "_C_cuda"
    space, key = ("vicreg_kernels_cuda", "CUDA") if cuda else ("vicreg_kernels_cpu", "CPU")
    names = [f"-DKERNELS_NAMESPACE={space}", f"-DKERNELS_KEY={key}"]
    shared = ["-std=c++20", *native.DEFINES, *names, "-Icsrc", "-isystem", str(include)]
    host = [native.compiler(), "-O0", "-fPIC", *shared]
    kernels, source = host, "cpu.cpp"
    if cuda:
        kernels, source = [nvcc(), "-O0", "-Xptxas", "-O0", "-arch=sm_90", "-DUSE_CUDA"], "cuda.cu"
        kernels += ["-Xcompiler", "-fPIC", *shared]
    made = []
    for command, file in ((kernels, source), (host, "registration.cpp")):
        target = scratch / f"{file}.o"
        done = subprocess.run(
            [*command, "-c", f"csrc/{op}/{file}", "-o", str(target)],
            cwd=native.ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"csrc/{op}/{file}, torch {version}:\n{done.stderr[-4000:]}"
        made.append(target)
    return made


@pytest.mark.parametrize("version", SUPPORTED)
@pytest.mark.parametrize("library", ["_C", "_C_cuda"])
@pytest.mark.parametrize("op", OPS)
def test_sources_compile_against(op: str, library: str, version: str, tmp_path: Path) -> None:
    made = objects(op, version, tmp_path, library)
    listed = subprocess.check_output(["nm", "--undefined-only", *map(str, made)], text=True)
    used = set(re.findall(r"\bU ((?:aoti_torch|torch)_\w+)$", listed, re.MULTILINE))
    assert used, "no C function of torch's is called: is this the right object?"
    absent = used - declared(headers(OLDEST))
    assert not absent, f"torch {OLDEST} does not export {sorted(absent)}"


def test_a_function_of_a_later_torch_is_noticed() -> None:
    """The oldest headers do not declare everything that the newest do."""
    older, newer = declared(headers(OLDEST)), declared(headers(SUPPORTED[-1]))
    assert "torch_call_dispatcher" in older
    assert "aoti_torch_get_current_cuda_stream" in older
    assert newer - older
