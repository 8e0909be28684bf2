"""Builds the two compiled libraries against torch's stable ABI, with ninja.

`_C` (CPU) is built where a C++ compiler, ninja and torch's headers are found, `_C_cuda` where torch
itself has CUDA and nvcc is found too; no GPU is needed. Neither links against a Python or a
particular torch: one wheel serves every Python >= 3.10 and every torch from TORCH_TARGET on.
Without a compiler or torch a checkout works as pure Python, with a warning; a wheel is an error
unless VICREG_KERNELS_BUILD=python asks for one, because pip would keep it and install it later,
where both are there. A library whose sources do not compile is left out, with a warning, and takes
nothing else with it. `vicreg-kernels info` repeats why a library is absent.

Torch itself is never imported here. Its headers are taken from the environment that the package is
installed into, also when pip isolates the build, so `pip install .` needs no second torch.

VICREG_KERNELS_BUILD     auto (default), python (nothing), cpu, cuda (both; one that does not build
                         is an error, though the other one is kept)
VICREG_KERNELS_TORCH     the directory of the torch package to build against
VICREG_KERNELS_ARCHS     CUDA architectures, "80;90" for example, the last also as PTX; "all" is
                         80;86;89;90;100;120; default: those of the GPUs that nvidia-smi lists, or
                         all where it lists none
VICREG_KERNELS_PORTABLE  1: libraries for other machines, x86-64 Linux with glibc >= 2.28 and
                         libstdc++ >= GCC 8's (manylinux_2_28); 0 (default): for machines at least
                         as new as this one
CXX, CUDA_HOME           the compilers
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
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
EVERY_ARCH = ("80", "86", "89", "90", "100", "120")
BUILD = os.environ.get("VICREG_KERNELS_BUILD", "auto")
PORTABLE = os.environ.get("VICREG_KERNELS_PORTABLE", "0")
# csrc/portable/older.cpp calls what glibc 2.28 has in libraries of their own and a newer one in
# libc; libgcc's newer helpers come from libgcc.a, the unwinder stays that of libgcc_s.
PORTABLE_LINK = ["-lgcc", "-Xlinker", "--version-script=csrc/portable/exports.map"]
PORTABLE_LINK += ["-Xlinker", "--no-as-needed", "-Xlinker", "-l:libdl.so.2"]
PORTABLE_LINK_CUDA = ["-Xlinker", "-l:libpthread.so.0", "-Xlinker", "-l:librt.so.1"]


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


def torch_version(torch: Path) -> tuple[str, str | None]:
    """(version, the CUDA it was built for, or None) of a torch that is not imported."""
    text = (torch / "version.py").read_text() if (torch / "version.py").exists() else ""
    version = re.search(r"^__version__ = ['\"](.+)['\"]", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b.*= ['\"](.+)['\"]", text, re.MULTILINE)
    return version.group(1) if version else "unknown", cuda.group(1) if cuda else None


def cxx() -> str | None:
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("c++") or shutil.which("g++")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return path or (str(usual) if usual.exists() else None)


def ninja() -> list[str] | None:
    """The command: the ninja of this Python's packages, which pip installs for the build, or the
    machine's."""
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    path = shutil.which("ninja")
    return [path] if path else None


def architectures() -> tuple[list[str], str]:
    """(CUDA architectures to build for, why those)."""
    named = os.environ.get("VICREG_KERNELS_ARCHS")
    if named == "all":
        return list(EVERY_ARCH), "VICREG_KERNELS_ARCHS=all"
    if named:
        if not re.fullmatch(r"\d+[af]?(;\d+[af]?)*", named):
            raise SystemExit(f"VICREG_KERNELS_ARCHS: got {named!r}, takes all or 80;90 for example")
        return named.split(";"), "VICREG_KERNELS_ARCHS"
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        text = ""
    here = {(int(a), int(b)) for a, b in re.findall(r"^(\d+)\.(\d)\s*$", text, re.MULTILINE)}
    if here:
        return [f"{major}{minor}" for major, minor in sorted(here)], "the GPUs of this machine"
    return list(EVERY_ARCH), "nvidia-smi lists no GPU here"


def plan() -> tuple[list[str], dict[str, str]]:
    """Which libraries to build, and for each one that is not, why."""
    missing: dict[str, str] = {}
    if BUILD not in ("auto", "python", "cpu", "cuda"):
        raise SystemExit(f"VICREG_KERNELS_BUILD: got {BUILD!r}, takes auto, python, cpu or cuda")
    if PORTABLE not in ("0", "1"):
        raise SystemExit(f"VICREG_KERNELS_PORTABLE: got {PORTABLE!r}, takes 0 or 1")
    machine = f"{platform.machine()} {platform.system()}"
    if PORTABLE == "1" and machine != "x86_64 Linux":
        raise SystemExit(f"VICREG_KERNELS_PORTABLE=1 is for x86_64 Linux, and this is {machine}")
    torch = torch_directory()
    if BUILD == "python":
        reason = "VICREG_KERNELS_BUILD=python when the package was built"
    elif cxx() is None:
        reason = "no C++ compiler was found when the package was built"
    elif torch is None:
        reason = "torch >= 2.11 was not installed where the package was built"
    elif ninja() is None:
        reason = "ninja was not installed where the package was built"
    else:
        reason = ""
    if reason:
        missing = {"_C": reason, "_C_cuda": reason}
    elif BUILD == "cpu":
        missing = {"_C_cuda": "VICREG_KERNELS_BUILD=cpu when the package was built"}
    elif nvcc() is None:
        missing = {"_C_cuda": "nvcc was not found when the package was built"}
    elif BUILD == "auto" and torch is not None and torch_version(torch)[1] is None:
        version = torch_version(torch)[0]
        missing = {"_C_cuda": f"the torch that the package was built with ({version}) has no CUDA"}
    if BUILD == "cuda" and missing:
        raise SystemExit(f"VICREG_KERNELS_BUILD=cuda, but {next(iter(missing.values()))}")
    if "_C" in missing and BUILD != "python":
        warnings.warn(f"vicreg-kernels is built as pure Python: {reason}", stacklevel=1)
    return [name for name in ("_C", "_C_cuda") if name not in missing], missing


WANTED, MISSING = plan()


def say(line: str) -> None:
    print(f"vicreg-kernels: {line}", flush=True)


def operations() -> list[str]:
    """The ops that have compiled code: one folder each, the same files in all."""
    return sorted(path.parent.name for path in (ROOT / "csrc").glob("*/registration.cpp"))


class Ninja:
    """What ninja is told: every command, what it makes and of what."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        # ninja keeps its own files in builddir, else beside the sources
        self.lines = ["ninja_required_version = 1.5", f"builddir = {self.escaped(scratch)}"]

    @staticmethod
    def escaped(path: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    def add(self, target: Path, sources: list[Path], command: list[str], description: str) -> None:
        """A command makes `target`. Its own name holds the place of the file of dependencies that
        the compiler writes, so that an edited header builds anew what includes it."""
        name = f"rule_{len(self.lines)}"
        words = shlex.join(command).replace("$", "$$")
        inputs = " ".join(map(self.escaped, sources))
        depfile = f"{target}.d"
        rule = [f"rule {name}", f"  command = {words}", f"  description = {description}"]
        if depfile in command:
            rule += [f"  depfile = {depfile.replace('$', '$$')}", "  deps = gcc"]
        self.lines += ["", *rule, f"build {self.escaped(target)}: {name} {inputs}"]

    def compile(self, name: str) -> list[Path]:
        """The objects of one library."""
        torch, compiler = torch_directory(), cxx()
        assert torch is not None
        assert compiler is not None
        include = ["-I", str(ROOT / "csrc"), "-isystem", str(torch / "include")]
        cuda = name == "_C_cuda"
        space, key = ("vicreg_kernels_cuda", "CUDA") if cuda else ("vicreg_kernels_cpu", "CPU")
        defines = [*DEFINES, f"-DKERNELS_NAMESPACE={space}", f"-DKERNELS_KEY={key}"]
        host = [compiler, *CXX_FLAGS, *defines, *include]
        # file names in messages: those of this machine are nothing to another one
        names = [f"-ffile-prefix-map={path}/=" for path in (ROOT, torch / "include")]
        host += names if PORTABLE == "1" else []
        kernels, file, suffix = host, "cpu.cpp", ""
        if cuda:
            tool = nvcc()
            assert tool is not None
            archs = architectures()[0]
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
            kernels = [tool, *NVCC_FLAGS, *codes, "--threads", str(min(len(archs), 4))]
            kernels += [*defines, "-DUSE_CUDA", *include]
            kernels += ["-Xcompiler", ",".join(names)] if PORTABLE == "1" else []
            file, suffix = "cuda.cu", " for " + ", ".join(f"sm_{a}" for a in archs)
        units = []
        for op in operations():
            units.append((kernels, op, file, f"csrc/{op}/{file}{suffix}"))
            what = f"csrc/{op}/registration.cpp for {name}"
            units.append((host, op, "registration.cpp", what))
        if PORTABLE == "1":
            command = [*host, "-DUSE_CUDA"] if cuda else host
            units.append((command, "portable", "older.cpp", f"csrc/portable/older.cpp for {name}"))
        objects = []
        for command, folder, source, what in units:
            target = self.scratch / f"{name}.{folder}.{source.partition('.')[0]}.o"
            words = ["--generate-dependencies-with-compile", "--dependency-output"]
            words = words if command[0] == nvcc() else ["-MD", "-MF"]
            words = [*command, *words, f"{target}.d", "-c", f"csrc/{folder}/{source}"]
            self.add(target, [ROOT / "csrc" / folder / source], [*words, "-o", str(target)], what)
            objects.append(target)
        return objects

    def link(self, name: str, objects: list[Path], target: Path) -> None:
        """The library of its objects."""
        torch, compiler = torch_directory(), cxx()
        assert torch is not None
        assert compiler is not None
        names = [str(path) for path in objects]
        names += PORTABLE_LINK if PORTABLE == "1" else []
        if name == "_C":
            # libtorch_cpu is found by name: torch has loaded it before this library
            link = [compiler, "-shared", *names, f"-L{torch / 'lib'}", "-ltorch_cpu"]
            self.add(target, objects, [*link, "-o", str(target)], f"link {target.name}")
            return
        # A CPU torch has no libtorch_cuda to link against; an empty library of that name makes the
        # loader look for the real one, where there is one.
        stub, empty = self.scratch / "libtorch_cuda.so", self.scratch / "empty.cpp"
        if not empty.exists():
            empty.touch()
        command = [compiler, "-shared", str(empty), f"-Wl,-soname,{stub.name}", "-o", str(stub)]
        self.add(stub, [empty], command, f"link a stand-in for {stub.name}")
        link = [nvcc() or "", "-shared", "-cudart", "static", *names, f"-L{self.scratch}"]
        link += PORTABLE_LINK_CUDA if PORTABLE == "1" else []
        link += [f"-L{torch / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch_cuda", "-ltorch_cpu"]
        self.add(target, [*objects, stub], [*link, "-o", str(target)], f"link {target.name}")

    def run(self, *words: str) -> tuple[int, str]:
        """(ninja's exit status, what it printed), from the root, printed as it comes."""
        file = self.scratch / "build.ninja"
        text = "\n".join(self.lines) + "\n"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        command = [*(ninja() or []), "-f", str(file), *words]
        environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "-n" not in words:
                print(line, end="", flush=True)
        return process.wait(), "".join(lines)

    def made(self, target: Path) -> bool:
        return "no work to do" in self.run("-n", str(target))[1]


def first_error(output: str, name: str) -> str:
    """What the compiler said first about a source of this library."""
    for block in output.split("FAILED: ")[1:]:
        if f"{name}." in block.splitlines()[0]:
            lines = [line.strip() for line in block.splitlines()[2:] if line.strip()]
            errors = [line for line in lines if "error" in line.lower()]
            return (errors or lines or [block.splitlines()[0]])[0]
    return "ninja did not build it"


def write_report(package: Path) -> None:
    """What was not built and why, for library.py to repeat to the user."""
    report = {name: f"{name}.abi3.so was not built: {why}" for name, why in MISSING.items()}
    (package / "build_report.json").write_text(json.dumps(report, indent=1) + "\n")


class BuildLibraries(build_ext):
    """Compiles and links each library with ninja; they are not Python modules."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".abi3.so"

    def run(self) -> None:
        """Builds below build/, from where setuptools copies to the sources when in place."""
        inplace = self.inplace
        try:
            super().run()
        finally:
            package = (ROOT if inplace else Path(self.build_lib).resolve()) / "vicreg_kernels"
            for name in MISSING if inplace else ():  # one of other sources must not be loaded
                (package / f"{name}.abi3.so").unlink(missing_ok=True)
            if package.is_dir():
                write_report(package)

    def build_extensions(self) -> None:
        torch = torch_directory()
        assert torch is not None
        for name, why in MISSING.items():
            say(f"leaves out {name}: {why}")
        scratch = Path(self.build_temp).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        job, targets = Ninja(scratch), {}
        for ext in self.extensions:
            name = ext.name.rpartition(".")[2]
            targets[name] = Path(self.get_ext_fullpath(ext.name)).resolve()
            targets[name].parent.mkdir(parents=True, exist_ok=True)
            job.link(name, job.compile(name), targets[name])
            archs, why = architectures()
            tool = f"{nvcc()} for sm_{', sm_'.join(archs)} ({why})" if name == "_C_cuda" else cxx()
            version = torch_version(torch)[0]
            say(f"builds {name}, {len(operations())} ops, with {tool} against torch {version}")
        _, output = job.run("-k", "0", *map(str, targets.values()))
        failed = [name for name, target in targets.items() if not job.made(target)]
        for name in failed:
            targets[name].unlink(missing_ok=True)
            MISSING[name] = first_error(output, name)
            warnings.warn(f"vicreg-kernels: {name} was not built: {MISSING[name]}", stacklevel=1)
        kept = [e for e in self.extensions if e.name.rpartition(".")[2] not in failed]
        self.extensions[:] = kept
        if failed and (BUILD == "cuda" or not kept):
            raise SystemExit(
                f"vicreg-kernels: {', '.join(failed)} did not build (its errors are above); "
                "VICREG_KERNELS_BUILD=cpu leaves out CUDA, VICREG_KERNELS_BUILD=python all "
                "compiled code"
            )


class BuildPackage(build_py):
    """Adds the report of what was not built to the package."""

    def run(self) -> None:
        super().run()
        write_report((ROOT if self.editable_mode else Path(self.build_lib)) / "vicreg_kernels")


class Wheel(bdist_wheel):
    """Tags a compiled wheel for every CPython from 3.10 on. One with nothing compiled must be asked
    for: pip keeps what it builds from a source distribution under the package's name and version.
    """

    def run(self) -> None:
        if not WANTED and BUILD != "python":
            raise SystemExit(
                f"vicreg-kernels: cannot build a wheel with compiled kernels: {MISSING['_C']}. "
                "Install torch >= 2.11 (pip install torch) and a C++20 compiler first, then "
                "install vicreg-kernels again. Or, for a package without compiled kernels (plain "
                "PyTorch on CPUs, Triton on GPUs): VICREG_KERNELS_BUILD=python pip install "
                "--no-cache-dir ..., whose cache would otherwise serve it to later installs too"
            )
        super().run()

    def finalize_options(self) -> None:
        super().finalize_options()
        if WANTED:
            self.root_is_pure = False
            self.py_limited_api = "cp310"


def long_description() -> str:
    """README.md for a package index, where a link to a file of the repository leads nowhere: each
    is made absolute by the Repository of pyproject.toml, at this version's tag. Without a
    Repository only its words stay.
    """
    project = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'^Repository = "(.+)"', project, re.MULTILINE)
    version = re.findall(r"[\d.]+", (ROOT / "vicreg_kernels" / "version.py").read_text())[0]

    def absolute(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if "://" in target:
            return match.group(0)
        if found is None:
            return words
        kind = "raw" if picture else "blob"
        return f"{picture}[{words}]({found.group(1)}/{kind}/v{version}/{target})"

    return re.sub(r"(!?)\[([^]]*)\]\(([^)]+)\)", absolute, (ROOT / "README.md").read_text())


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",  # here, because setuptools changed the key's form in pyproject.toml
    ext_modules=[
        Extension(f"vicreg_kernels.{name}", sources=[], py_limited_api=True) for name in WANTED
    ],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
