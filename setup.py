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
import shlex
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
CXX_FLAGS += shlex.split(os.environ.get("CXXFLAGS", ""))
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


def operations() -> list[str]:
    """The ops that have compiled code: one folder each, the same files in all."""
    return sorted(path.parent.name for path in (ROOT / "csrc").glob("*/registration.cpp"))


def compilations(name: str, scratch: Path) -> list[tuple[Path, list[str], str]]:
    """(object, its compile command, its op) for every source of one library."""
    torch = torch_directory()
    compiler = cxx()
    assert torch is not None
    assert compiler is not None
    include = ["-I", str(ROOT / "csrc"), "-isystem", str(torch / "include")]
    cuda = name == "_C_cuda"
    space, key = ("vicreg_kernels_cuda", "CUDA") if cuda else ("vicreg_kernels_cpu", "CPU")
    defines = [*DEFINES, f"-DKERNELS_NAMESPACE={space}", f"-DKERNELS_KEY={key}"]
    host = [compiler, *CXX_FLAGS, *defines, *include]
    kernels, source = host, "cpu.cpp"
    if cuda:
        tool = nvcc()
        assert tool is not None
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
        codes.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
        kernels = [tool, *NVCC_FLAGS, *codes, "--threads", "0", *defines, "-DUSE_CUDA", *include]
        source = "cuda.cu"
    found = []
    for op in operations():
        for command, file in ((kernels, source), (host, "registration.cpp")):
            target = scratch / f"{name}.{op}.{file.partition('.')[0]}.o"
            found.append((target, [*command, "-c", f"csrc/{op}/{file}", "-o", str(target)], op))
    return found


def links(name: str, objects: list[Path], target: Path, scratch: Path) -> list[list[str]]:
    """The commands that make the library of its objects."""
    torch = torch_directory()
    compiler = cxx()
    assert torch is not None
    assert compiler is not None
    names = [str(path) for path in objects]
    if name == "_C":
        # libtorch_cpu is found by name: torch has loaded it before this library
        link = [compiler, "-shared", *names, f"-L{torch / 'lib'}", "-ltorch_cpu"]
        return [[*link, "-o", str(target)]]
    # A CPU torch has no libtorch_cuda to link against; an empty library of that name makes the
    # loader look for the real one, where there is one.
    stub = scratch / "libtorch_cuda.so"
    empty = [compiler, "-shared", "-x", "c++", "/dev/null", f"-Wl,-soname,{stub.name}"]
    link = [nvcc() or "", "-shared", "-cudart", "static", *names, f"-L{scratch}"]
    link += [f"-L{torch / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch_cuda", "-ltorch_cpu"]
    return [[*empty, "-o", str(stub)], [*link, "-o", str(target)]]


def up_to_date(target: Path, command: list[str], op: str) -> bool:
    """Whether an object was made by this very command, from sources no newer than it."""
    note = target.with_suffix(".command")
    if not target.exists() or not note.exists() or note.read_text() != " ".join(command):
        return False
    sources = [path for folder in (op, "common") for path in (ROOT / "csrc" / folder).iterdir()]
    return all(path.stat().st_mtime < target.stat().st_mtime for path in sources)


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
        scratch = Path(self.build_temp).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        names = {ext.name.rpartition(".")[2]: ext for ext in self.extensions}
        plans = {name: compilations(name, scratch) for name in names}
        waiting = [job for plan in plans.values() for job in plan if not up_to_date(*job)]
        waiting.sort(key=lambda job: not job[1][-3].endswith(".cu"))  # the slow ones first
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: self.compile(job[0], job[1]), waiting))
        for name, plan in plans.items():
            target = Path(self.get_ext_fullpath(names[name].name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            for command in links(name, [job[0] for job in plan], target, scratch):
                self.execute(command)

    def compile(self, target: Path, command: list[str]) -> None:
        self.execute(command)
        target.with_suffix(".command").write_text(" ".join(command))

    def execute(self, command: list[str]) -> None:
        print(" ".join(command), flush=True)
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise SystemExit(
                f"{command[0]} failed; VICREG_KERNELS_BUILD=cpu leaves out CUDA, "
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
