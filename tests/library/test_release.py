"""What is released: the contents of the source distribution, its description for a package index,
and README's blocks of code. `make wheel` checks the wheels (bench/release/build.py)."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from bench.release.contents import sdist_differences, wheel_differences

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, cwd: Path) -> str:
    environment = {**os.environ, "VICREG_KERNELS_BUILD": "python", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What could get into a source distribution: sources, a build's report, other folders."""
    root = tmp_path_factory.mktemp("checkout")
    files = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
    for name in (*files, "Makefile"):
        shutil.copy(ROOT / name, root)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("vicreg_kernels", "python", "csrc"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    # setuptools takes tests/test*.py by itself
    for name in ("tests/test_all.py", "runs/a/run.json", "docs/a.md", "bench/a.py"):
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    (root / "vicreg_kernels" / "build_report.json").write_text("{}")
    return root


def test_what_the_source_distribution_holds(checkout: Path, tmp_path: Path) -> None:
    run(sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert sdist_differences(sdist, checkout) == []
    with tarfile.open(sdist) as file:
        names = [each.name.partition("/")[2] for each in file]
    assert "csrc/portable/exports.map" in names
    assert "python/vicreg_jepa/config/recipes/vicreg_digits.yaml" in names
    assert not [name for name in names if name.startswith("csrc/emulator")]
    # and what is more or less is told
    other = tmp_path / "other.tar.gz"
    with tarfile.open(sdist) as old, tarfile.open(other, "w:gz") as new:
        for each in old:
            if not each.name.endswith("/csrc/ema/cpu.cpp"):
                new.addfile(each, old.extractfile(each) if each.isfile() else None)
        new.addfile(tarfile.TarInfo("vicreg_kernels-0/runs/a.json"), io.BytesIO())
    assert sdist_differences(other, checkout) == ["holds runs/a.json", "lacks csrc/ema/cpu.cpp"]


def test_what_is_more_or_less_in_a_wheel_is_told(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    package = tmp_path / "vicreg_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    described = "vicreg_kernels-0.1.0.dist-info"
    names = [f"{described}/{name}" for name in ("METADATA", "RECORD", "WHEEL")]
    names += [f"{described}/{name}" for name in ("entry_points.txt", "top_level.txt")]
    names += [f"{described}/licenses/LICENSE", "vicreg_kernels/build_report.json"]
    names += ["csrc/ema/cpu.cpp", "vicreg_kernels/_C.abi3.so"]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in names:
            file.writestr(name, "")
    assert wheel_differences(wheel, tmp_path, ("_C_cuda",)) == [
        "holds csrc/ema/cpu.cpp",
        "holds vicreg_kernels/_C.abi3.so",
        "lacks vicreg_kernels/_C_cuda.abi3.so",
        "lacks vicreg_kernels/__init__.py",
    ]


def test_links_of_the_description_are_absolute(checkout: Path) -> None:
    """With a Repository in pyproject.toml; without one only the words of links stay."""
    command = (sys.executable, "-W", "ignore", "setup.py", "-q", "--long-description")
    link = r"\]\(([^)]*)\)"
    project = checkout / "pyproject.toml"
    given = project.read_text()
    without = re.sub(r'^Repository = ".*"\n', "", given, flags=re.MULTILINE)
    url = "https://example.org/owner/name"
    table = f'[project.urls]\nRepository = "{url}"\n'
    with_one = without.replace("[project.scripts]", f"{table}\n[project.scripts]")
    try:
        project.write_text(without)
        text = run(*command, cwd=checkout)
        assert re.findall(link, text) == []
        assert "[N, D]" in text
        assert "VICReg · SIGReg" in text
        project.write_text(with_one)
        links = re.findall(link, run(*command, cwd=checkout))
    finally:
        project.write_text(given)
    readme = re.findall(link, (ROOT / "README.md").read_text())
    assert len(links) == len(readme) > 20
    assert [each for each in links if "://" not in each] == []
    assert any(re.fullmatch(url + r"/blob/v[\d.]+/docs/vicreg.md", each) for each in links)
    assert any(
        re.fullmatch(url + r"/raw/v[\d.]+/docs/assets/speed_cpu.png", each) for each in links
    )

    def exists(link: str) -> bool:
        return "://" in link or (ROOT / link.partition("#")[0]).exists()

    assert [each for each in readme if not exists(each)] == []


def test_the_readmes_blocks_of_code_run() -> None:
    said = run(sys.executable, "-W", "ignore", "bench/release/quickstart.py", "README.md", cwd=ROOT)
    lines = re.findall(r": (\d+) lines of README.md ran", said)
    assert int(lines[0]) > 10
