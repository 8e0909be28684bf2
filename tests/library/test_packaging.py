"""The package as a user gets it: wheels built with and without compilers, in environments of their
own, and what the compiled library asks of the machine it is loaded on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.release.contents import wheel_differences
from bench.release.installed import environment as environment_with
from vicreg_kernels.core import library

ROOT = Path(__file__).resolve().parents[2]

CHECK = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, vicreg_kernels as vk
from vicreg_kernels.core import dispatch, library
x = torch.randn(8, 32, requires_grad=True)
vk.vicreg_loss(x, torch.randn(8, 32)).backward()
print(vk.__file__)
print(dispatch.choose("vicreg", None, "cpu", torch.float32), bool(x.grad.isfinite().all()))
print(library.CPU_MISSING)
print(sum("plain PyTorch on CPUs" in str(w.message) for w in caught))
"""

# The command `vicreg-jepa` where a package of its extra is missing.
COMMAND = """
import contextlib, importlib.metadata, io, sys
sys.modules["yaml"] = None
(command,) = importlib.metadata.entry_points(group="console_scripts", name="vicreg-jepa")
with contextlib.redirect_stderr(io.StringIO()) as said:
    code = command.load()(["train", "vicreg_digits", "--output", "x"])
print(code, said.getvalue())
"""


def build_wheel(tmp_path: Path, **environment: str) -> tuple[Path, str]:
    """A wheel of a clean copy of the sources; the copy, so that nothing built here leaks in."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    ignored = shutil.ignore_patterns("*.so", "build_report.json", "__pycache__")
    for name in ("vicreg_kernels", "python"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    out = tmp_path / "wheels"
    done = subprocess.run(
        [
            sys.executable,
            *["-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"],
            "-w",
            out,
            source,
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout + done.stderr


def run_installed(wheel: Path, tmp_path: Path, code: str) -> list[str]:
    """Install the wheel in an empty environment that sees nothing of this checkout but torch."""
    environment = tmp_path / "environment"
    python = environment_with(wheel, environment)
    done = subprocess.run(
        [str(python), "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(str(environment)), done.stdout
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.thorough
def test_compiled_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    # How fast it runs is not what is asked.
    wheel, _ = build_wheel(tmp_path, VICREG_KERNELS_BUILD="cpu", CXXFLAGS="-O0")
    assert re.search(r"-cp310-abi3-linux_\w+\.whl$", wheel.name), wheel.name
    assert wheel_differences(wheel, ROOT, ("_C",)) == []
    lines = run_installed(wheel, tmp_path, CHECK)
    assert lines[1:] == ["cpu True", "None", "0"]


def test_a_pure_python_wheel_that_is_asked_for(tmp_path: Path) -> None:
    wheel, _ = build_wheel(tmp_path, VICREG_KERNELS_BUILD="python")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel_differences(wheel, ROOT, ()) == []
    lines = run_installed(wheel, tmp_path, CHECK + COMMAND)
    assert lines[1] == "reference True"
    assert lines[2].startswith("_C.abi3.so was not built: VICREG_KERNELS_BUILD=python")
    assert lines[3] == "1"  # said once
    assert lines[4].startswith("2 vicreg-jepa: import of yaml")
    assert "pip install 'vicreg-kernels[trainer]'" in lines[4]


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found"),
        ({"VICREG_KERNELS_TORCH": "/nowhere"}, "torch >= 2.11 was not installed"),
        ({"CXX": "no-such-compiler", "VICREG_KERNELS_BUILD": "cpu"}, "no C++ compiler was found"),
    ],
)
@pytest.mark.parametrize("command", ["bdist_wheel", "dist_info", "sdist"])
def test_no_wheel_without_kernels_unless_asked_for(
    tmp_path: Path, command: str, environment: dict[str, str], why: str
) -> None:
    """pip would keep it and install it later, beside torch and a compiler. What describes the
    package or packs its sources works anywhere.
    """
    source = tmp_path / "source"
    (source / "vicreg_kernels").mkdir(parents=True)
    (source / "python" / "vicreg_jepa").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("__init__.py", "version.py"):
        shutil.copy(ROOT / "vicreg_kernels" / name, source / "vicreg_kernels")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", command],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if command != "bdist_wheel":
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode != 0
    assert not list(source.rglob("*.whl"))
    assert f"cannot build a wheel with compiled kernels: {why}" in done.stderr
    assert "VICREG_KERNELS_BUILD=python pip install --no-cache-dir" in done.stderr


def test_asking_for_cuda_without_nvcc_fails_instead_of_falling_back(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "VICREG_KERNELS_BUILD": "cuda", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "VICREG_KERNELS_BUILD=cuda, but no C++ compiler was found" in done.stderr


@pytest.mark.skipif(library.CPU_MISSING is not None, reason="_C was not built")
def test_library_needs_no_python_and_only_torchs_stable_symbols() -> None:
    """One library for every Python >= 3.10 and every torch from the target version on."""
    path = ROOT / "vicreg_kernels" / "_C.abi3.so"
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if name.startswith(("Py", "_Py"))]
    # mangled names of torch's C++ namespaces, whose ABI changes between releases
    assert not [name for name in names if re.match(r"_ZN?K?(2at|3c10|5torch)", name)]


def test_the_import_succeeds_with_nothing_compiled_and_no_triton(tmp_path: Path) -> None:
    package = tmp_path / "vicreg_kernels"
    shutil.copytree(
        ROOT / "vicreg_kernels", package, ignore=shutil.ignore_patterns("*.so", "*.json")
    )
    code = "import sys; sys.modules['triton'] = None\n" + CHECK
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(str(package))
    assert done.stdout.splitlines()[1] == "reference True"
    assert "was not built" in done.stdout
