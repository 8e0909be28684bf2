"""What setup.py builds, on which evidence, and what it leaves standing when something fails.

Each test runs it on a checkout of one op whose sources are a line each (test_packaging.py compiles
the real ones), beside a directory that passes for torch's and tools that pass for nvcc and
nvidia-smi.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.helpers import native

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

# Passes the compile of a .cu file on to g++, without its code, and links what it is given.
NVCC = """#!/usr/bin/env python3
import os, subprocess, sys
words = sys.argv[1:]
out = words[words.index("-o") + 1]
if "-shared" in words:
    sys.exit(subprocess.call(["g++", "-shared", "-x", "c++", "/dev/null", "-o", out]))
source = words[words.index("-c") + 1]
if source in os.environ.get("BROKEN", ""):
    print(source + "(84): error: identifier \\"NO_SUCH_MACRO\\" is undefined")
    sys.exit(2)
depfile = words[words.index("--dependency-output") + 1]
open(depfile, "w").write(out + ": " + source + "\\n")
sys.exit(subprocess.call(["g++", "-fPIC", "-c", "-x", "c++", "/dev/null", "-o", out]))
"""

SOURCES = {
    "formula.h": "#pragma once\ninline int twice(int x) { return 2 * x; }\n",
    "cpu.cpp": '#include "ema/formula.h"\nint ema_cpu(int x) { return twice(x); }\n',
    "cuda.cu": '#include "ema/formula.h"\nint ema_cuda(int x) { return twice(x); }\n',
    "registration.cpp": "int ema_registered = 1;\n",
}


@dataclass(frozen=True)
class Checkout:
    """A copy of the sources, and the environment its setup.py runs in."""

    root: Path
    environment: dict[str, str]

    def build(self, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=self.root,
            env={**self.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def built(self) -> list[str]:
        return sorted(p.name for p in (self.root / "vicreg_kernels").glob("*.so"))

    def report(self) -> dict[str, str]:
        return json.loads((self.root / "vicreg_kernels" / "build_report.json").read_text())


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """One op's sources; a torch that has CUDA; an nvcc; no GPU."""
    root, fake, tools = tmp_path / "source", tmp_path / "torch", tmp_path / "tools"
    root.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    (root / "csrc" / "ema").mkdir(parents=True)
    for name, text in SOURCES.items():
        (root / "csrc" / "ema" / name).write_text(text)
    package = root / "vicreg_kernels"
    package.mkdir()
    for name in ("__init__.py", "version.py"):
        shutil.copy(ROOT / "vicreg_kernels" / name, package)
    fake.mkdir()
    for name in ("include", "lib"):
        (fake / name).symlink_to(TORCH / name)
    (fake / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    (tools / "bin").mkdir(parents=True)
    script(tools / "bin" / "nvcc", NVCC)
    script(tools / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VICREG_KERNELS_")}
    environment |= {
        "VICREG_KERNELS_TORCH": str(fake),
        "CUDA_HOME": str(tools),
        "PATH": f"{tools / 'bin'}:{os.environ['PATH']}",
        "CXXFLAGS": "-O0",
    }
    return Checkout(root, environment)


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_a_cuda_source_that_fails_leaves_the_cpu_library(checkout: Checkout) -> None:
    done = checkout.build(BROKEN="csrc/ema/cuda.cu")
    assert done.returncode == 0, done.stdout
    assert checkout.built() == ["_C.abi3.so"]
    said = '_C_cuda was not built: csrc/ema/cuda.cu(84): error: identifier "NO_SUCH_MACRO"'
    assert said in done.stdout
    assert said.split(": ", 1)[1] in checkout.report()["_C_cuda"]
    # asked for by name it is an error, and the CPU library stays all the same
    done = checkout.build(BROKEN="csrc/ema/cuda.cu", VICREG_KERNELS_BUILD="cuda")
    assert done.returncode != 0
    assert "_C_cuda did not build" in done.stdout
    assert checkout.built() == ["_C.abi3.so"]
    assert "NO_SUCH_MACRO" in checkout.report()["_C_cuda"]
    # mended, it is there, and the report has nothing left to say
    done = checkout.build(VICREG_KERNELS_BUILD="cuda")
    assert done.returncode == 0, done.stdout
    assert checkout.built() == ["_C.abi3.so", "_C_cuda.abi3.so"]
    assert checkout.report() == {}
    # and one that is broken afterwards leaves no library of the older sources
    (checkout.root / "csrc" / "ema" / "cuda.cu").touch()
    assert checkout.build(BROKEN="csrc/ema/cuda.cu").returncode == 0
    assert checkout.built() == ["_C.abi3.so"]


def test_a_cpu_source_that_fails_leaves_the_cuda_library(checkout: Checkout) -> None:
    with (checkout.root / "csrc" / "ema" / "cpu.cpp").open("a") as file:
        file.write("\nint broken = no_such_name;\n")
    done = checkout.build()
    assert done.returncode == 0, done.stdout
    assert checkout.built() == ["_C_cuda.abi3.so"]
    assert "no_such_name" in checkout.report()["_C"]
    done = checkout.build(VICREG_KERNELS_BUILD="cpu")
    assert done.returncode != 0, "nothing is left that could be installed"
    assert "_C did not build" in done.stdout


def test_cuda_is_built_only_beside_a_torch_that_has_it(checkout: Checkout) -> None:
    version = Path(checkout.environment["VICREG_KERNELS_TORCH"]) / "version.py"
    version.write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    done = checkout.build()
    assert done.returncode == 0, done.stdout
    assert checkout.built() == ["_C.abi3.so"]
    assert "2.13.0+cpu) has no CUDA" in checkout.report()["_C_cuda"]
    assert "leaves out _C_cuda" in done.stdout
    assert "cuda.cu" not in done.stdout
    done = checkout.build(VICREG_KERNELS_BUILD="cuda")  # for a wheel that is used elsewhere
    assert done.returncode == 0, done.stdout
    assert checkout.built() == ["_C.abi3.so", "_C_cuda.abi3.so"]


def architectures(done: subprocess.CompletedProcess[str]) -> str:
    (line,) = [line for line in done.stdout.splitlines() if "builds _C_cuda" in line]
    return line.split(" for ", 1)[1]


def test_architectures_are_those_of_the_gpus_or_all(checkout: Checkout) -> None:
    done = checkout.build()
    assert "builds _C, 1 ops, with" in done.stdout
    assert "csrc/ema/cuda.cu for sm_80, sm_86, sm_89, sm_90, sm_100, sm_120" in done.stdout
    assert architectures(done).startswith("sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 (nvidia-smi")
    smi = Path(checkout.environment["CUDA_HOME"]) / "bin" / "nvidia-smi"
    script(smi, "#!/bin/sh\nprintf '9.0\\n8.0\\n9.0\\n'\n")
    done = checkout.build()
    assert architectures(done).startswith("sm_80, sm_90 (the GPUs of this machine)")
    ninja = next((checkout.root / "build").rglob("build.ninja")).read_text()
    assert "arch=compute_90,code=compute_90" in ninja, "the last one is kept as PTX as well"
    assert "sm_86" not in ninja
    done = checkout.build(VICREG_KERNELS_ARCHS="100")
    assert architectures(done).startswith("sm_100 (VICREG_KERNELS_ARCHS)")
    done = checkout.build(VICREG_KERNELS_ARCHS="all")
    assert architectures(done).startswith("sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 (VICREG")
    done = checkout.build(VICREG_KERNELS_ARCHS="9.0")
    assert done.returncode != 0
    assert "VICREG_KERNELS_ARCHS: got '9.0'" in done.stdout


# What the real sources take from newer glibc, libstdc++ and libgcc.
NEWER = """
#include <dlfcn.h>

#include <cmath>
#include <memory>
#include <sstream>
#include <vector>

double call(double x, const std::shared_ptr<int>& shared, void* name, _Float16 half, float* out) {
  std::ostringstream stream;
  std::shared_ptr<int> copy = shared;
  std::vector<long> many(static_cast<size_t>(x));
  stream << *copy << many.size();
  *out = half;
  *static_cast<_Float16*>(name) = static_cast<_Float16>(x);
  return std::exp(x) + stream.str().size() + (dlsym(name, "x") == nullptr);
}
"""
# What manylinux_2_28 has.
MOST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8,)}


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="is for x86-64")
def test_a_portable_library_asks_for_nothing_newer(checkout: Checkout) -> None:
    shutil.copytree(ROOT / "csrc" / "portable", checkout.root / "csrc" / "portable")
    (checkout.root / "csrc" / "ema" / "cpu.cpp").write_text(NEWER)
    done = checkout.build(VICREG_KERNELS_BUILD="cpu", VICREG_KERNELS_PORTABLE="1")
    assert done.returncode == 0, done.stdout
    path = checkout.root / "vicreg_kernels" / "_C.abi3.so"
    listed = subprocess.run(["objdump", "-T", path], capture_output=True, text=True, check=True)
    versions = set(re.findall(r"\(?\b([A-Z]+)_([0-9.]+)\)? ", listed.stdout))
    assert {"GLIBC", "GLIBCXX"} <= {name for name, _ in versions}
    numbers = {(name, tuple(map(int, number.split(".")))) for name, number in versions}
    assert [each for each in sorted(numbers) if each[1] > MOST[each[0]]] == []
    undefined = [line for line in listed.stdout.splitlines() if "*UND*" in line]
    assert [line for line in undefined if "GLIBC_2.2.5" in line and line.endswith(" exp")]
    assert not re.findall(r"^[0-9a-f]+ +[gw](?!.*\*UND\*).*$", listed.stdout, re.MULTILINE)
    done = checkout.build(VICREG_KERNELS_PORTABLE="yes")
    assert "VICREG_KERNELS_PORTABLE: got 'yes', takes 0 or 1" in done.stdout


def test_an_edited_header_builds_anew_what_includes_it(checkout: Checkout) -> None:
    assert "cpu.cpp" in checkout.build().stdout
    again = checkout.build()
    assert again.returncode == 0
    assert "no work to do" in again.stdout
    (checkout.root / "csrc" / "ema" / "formula.h").touch()
    third = checkout.build()
    assert "csrc/ema/cpu.cpp" in third.stdout
    assert "registration.cpp" not in third.stdout, "it does not include the formula"
    fourth = checkout.build(CXXFLAGS="-O0 -DCHANGED")
    assert "registration.cpp" in fourth.stdout


def test_without_ninja_the_package_is_pure_python_and_says_so(checkout: Checkout) -> None:
    code = "import importlib.util as u, runpy, sys; real = u.find_spec\n"
    code += "u.find_spec = lambda name, *a: None if name == 'ninja' else real(name, *a)\n"
    code += "import shutil; which = shutil.which\n"
    code += "shutil.which = lambda name, **k: None if name == 'ninja' else which(name, **k)\n"
    code += "sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']\n"
    code += "runpy.run_path('setup.py', run_name='__main__')\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=checkout.root, env=checkout.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "built as pure Python: ninja was not installed" in done.stderr
    assert checkout.built() == []
    assert "ninja was not installed" in checkout.report()["_C"]


def test_an_edited_header_of_a_subfolder_is_seen_by_the_test_builds(tmp_path, monkeypatch):
    """Else the emulator's library of before the edit would be tested."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(native, "ROOT", tmp_path)
    seen = {native.key("attention")}
    for name in ("attention/cuda/tiles.cuh", "attention/cpu/kernels.h", "common/cuda/mma.cuh"):
        with (tmp_path / "csrc" / name).open("a") as file:
            file.write("// edited\n")
        seen.add(native.key("attention"))
    assert len(seen) == 4
