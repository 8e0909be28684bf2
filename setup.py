"""Builds the two compiled libraries against torch's stable ABI.

`_C` (CPU) is built where a C++ compiler and torch's headers are found, `_C_cuda` where nvcc is
found too; no GPU is needed. Neither links against a Python or a particular torch: one wheel serves
every Python >= 3.10 and every torch from TORCH_TARGET on. Without a compiler the package installs
as pure Python, with a warning, and `vicreg-kernels info` repeats why.

Torch itself is never imported here. Its headers are taken from the environment that the package is
installed into, also when pip isolates the build, so `pip install .` needs no second torch.

VICREG_KERNELS_BUILD     auto (default), python (nothing), cpu, cuda (both or fail)
VICREG_KERNELS_TORCH     the directory of the torch package to build against
VICREG_KERNELS_ARCHS     CUDA architectures, default "80;86;89;90;100;120"; the last also as PTX
CXX, CUDA_HOME           the compilers
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020b000000000000"  # torch 2.11
DEFINES = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# NaN and Inf must propagate, so no -ffast-math; these two only drop errno and trap semantics.
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
ARCHS = os.environ.get("VICREG_KERNELS_ARCHS", "80;86;89;90;100;120").split(";")
BUILD = os.environ.get("VICREG_KERNELS_BUILD", "auto")


def torch_directory() -> Path | None:
    """Where torch is installed: named, importable, or beside where this package will go."""
    named = os.environ.get("VICREG_KERNELS_TORCH")
    if named:
        candidates = [Path(named)]
    else:
        spec = importlib.util.find_spec("torch")
        candidates = [Path(spec.origin).parent] if spec and spec.origin else []
        candidates += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    for candidate in candidates:
        if (candidate / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return candidate
    return None


def cxx() -> str | None:
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("c++") or shutil.which("g++")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return found or (str(usual) if usual.exists() else None)


def plan() -> tuple[list[str], dict[str, str]]:
    """Which libraries to build, and for each one that is not, why."""
    missing: dict[str, str] = {}
    if BUILD not in ("auto", "python", "cpu", "cuda"):
        raise SystemExit(f"VICREG_KERNELS_BUILD: got {BUILD!r}, takes auto, python, cpu or cuda")
    if BUILD == "python":
        reason = "VICREG_KERNELS_BUILD=python when the package was built"
    elif cxx() is None:
        reason = "no C++ compiler was found when the package was built"
    elif torch_directory() is None:
        reason = "torch >= 2.11 was not installed where the package was built"
    else:
        reason = ""
    if reason:
        missing = {"_C": reason, "_C_cuda": reason}
    elif BUILD == "cpu":
        missing = {"_C_cuda": "VICREG_KERNELS_BUILD=cpu when the package was built"}
    elif nvcc() is None:
        missing = {"_C_cuda": "nvcc was not found when the package was built"}
    if BUILD == "cuda" and missing:
        raise SystemExit(f"VICREG_KERNELS_BUILD=cuda, but {next(iter(missing.values()))}")
    if "_C" in missing and BUILD != "python":
        warnings.warn(f"vicreg-kernels is built as pure Python: {reason}", stacklevel=1)
    return [name for name in ("_C", "_C_cuda") if name not in missing], missing


WANTED, MISSING = plan()


def commands(name: str, target: Path, scratch: Path) -> list[list[str]]:
    """The compile commands of one library, the link command last."""
    torch = torch_directory()
    compiler = cxx()
    assert torch is not None
    assert compiler is not None
    include = ["-I", str(ROOT / "csrc"), "-isystem", str(torch / "include")]
    cuda = name == "_C_cuda"
    space, key = ("vicreg_kernels_cuda", "CUDA") if cuda else ("vicreg_kernels_cpu", "CPU")
    defines = [*DEFINES, f"-DVICREG_NAMESPACE={space}", f"-DVICREG_KEY={key}"]
    registration = scratch / f"{name}.registration.o"
    kernels = scratch / f"{name}.kernels.o"
    first = [compiler, *CXX_FLAGS, *defines, *include, "-c", "csrc/registration.cpp"]
    first += ["-o", str(registration)]
    objects = [str(registration), str(kernels)]
    if not cuda:
        second = [compiler, *CXX_FLAGS, *defines, *include, "-c", "csrc/vicreg/cpu.cpp"]
        # libtorch_cpu is found by name: torch has loaded it before this library
        link = [compiler, "-shared", *objects, f"-L{torch / 'lib'}", "-ltorch_cpu"]
    else:
        compiler = nvcc()
        assert compiler is not None
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
        codes.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
        include = ["-I", str(ROOT / "csrc"), "-isystem", str(torch / "include")]
        second = [compiler, *NVCC_FLAGS, *codes, "--threads", "0", *defines, "-DUSE_CUDA"]
        second += [*include, "-c", "csrc/vicreg/cuda.cu", "-o", str(kernels)]
        # A CPU torch has no libtorch_cuda to link against; an empty library of that name makes the
        # loader look for the real one, where there is one.
        stub = scratch / "libtorch_cuda.so"
        named = [cxx() or "", "-shared", "-x", "c++", "/dev/null", f"-Wl,-soname,{stub.name}"]
        link = [compiler, "-shared", "-cudart", "static", *objects, f"-L{scratch}"]
        link += [f"-L{torch / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch_cuda", "-ltorch_cpu"]
        return [first, second, [*named, "-o", str(stub)], [*link, "-o", str(target)]]
    return [first, [*second, "-o", str(kernels)], [*link, "-o", str(target)]]


def write_report(root: Path) -> None:
    """What was not built and why, for library.py to repeat to the user."""
    report = {name: f"{name}.abi3.so was not built: {why}" for name, why in MISSING.items()}
    (root / "vicreg_kernels" / "build_report.json").write_text(json.dumps(report, indent=1) + "\n")


class BuildLibraries(build_ext):
    """Compiles and links each library with the commands above; they are not Python modules."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".abi3.so"

    def run(self) -> None:
        super().run()
        if self.inplace:
            write_report(ROOT)

    def build_extensions(self) -> None:
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.build_extension, self.extensions))

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        for command in commands(name, target, Path(self.build_temp).resolve()):
            print(" ".join(command), flush=True)
            done = subprocess.run(command, cwd=ROOT)
            if done.returncode != 0:
                raise SystemExit(
                    f"compiling {name} failed; VICREG_KERNELS_BUILD=cpu leaves out CUDA, "
                    "VICREG_KERNELS_BUILD=python all compiled code"
                )


class BuildPackage(build_py):
    """Adds the report of what was not built to the package."""

    def run(self) -> None:
        super().run()
        write_report(ROOT if self.editable_mode else Path(self.build_lib))


class Wheel(bdist_wheel):
    """Tags a compiled wheel for every CPython from 3.10 on."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if WANTED:
            self.root_is_pure = False
            self.py_limited_api = "cp310"


setup(
    license="Apache-2.0",  # here, because setuptools changed the key's form in pyproject.toml
    ext_modules=[
        Extension(f"vicreg_kernels.{name}", sources=[], py_limited_api=True) for name in WANTED
    ],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
