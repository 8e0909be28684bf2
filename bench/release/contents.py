"""What a wheel and a source distribution hold: these files, no other, and none is missing."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

# In the wheel's *.dist-info, which tools write; the licence lies in a folder of its own or not.
DESCRIBED = ("LICENSE", "METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")
ROOT_FILES = (
    "CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py",
)  # fmt: skip
# What setuptools adds at the root of a source distribution.
ADDED = ("PKG-INFO", "setup.cfg")


def _packages(root: Path) -> set[str]:
    """The files of the two packages, as a wheel names them."""
    found = set()
    for package in (root / "vicreg_kernels", root / "python" / "vicreg_jepa"):
        for path in package.rglob("*"):
            kept = (
                path.suffix in (".py", ".json", ".yaml", ".safetensors") or path.name == "py.typed"
            )
            if kept and path.name != "build_report.json":
                found.add(path.relative_to(package.parent).as_posix())
    return found


def _differences(found: Sequence[str], wanted: set[str]) -> list[str]:
    extra = [f"holds {name}" for name in sorted(set(found) - wanted)]
    twice = [f"holds {name} twice" for name in sorted(set(found)) if list(found).count(name) > 1]
    return extra + twice + [f"lacks {name}" for name in sorted(wanted - set(found))]


def wheel_differences(wheel: Path, root: Path, libraries: Sequence[str]) -> list[str]:
    """How a wheel of the sources at `root` with these compiled libraries, "_C" and "_C_cuda", is
    other than it should be; empty: it is not.
    """
    names = [re.sub(r"-\S+\.dist-info/(licenses/)?", ".dist-info/", name) for name in _names(wheel)]
    wanted = {f"vicreg_kernels.dist-info/{name}" for name in DESCRIBED}
    wanted |= {f"vicreg_kernels/{name}.abi3.so" for name in libraries}
    return _differences(names, wanted | _packages(root) | {"vicreg_kernels/build_report.json"})


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        return [name for name in file.namelist() if not name.endswith("/")]


def sdist_differences(sdist: Path, root: Path) -> list[str]:
    """The same of a source distribution of the sources at `root`."""
    with tarfile.open(sdist) as file:
        names = [each.name.partition("/")[2] for each in file if not each.isdir()]
    names = [name for name in names if not name.startswith("vicreg_kernels.egg-info/")]
    wanted = {*ROOT_FILES, *ADDED}
    for path in (root / "csrc").rglob("*"):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not name.startswith("csrc/emulator/"):
            wanted.add(name)
    for name in _packages(root):
        wanted.add(name if name.startswith("vicreg_kernels/") else f"python/{name}")
    return _differences(names, wanted)
