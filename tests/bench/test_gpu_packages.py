"""The trainer's packages on a machine without a network: wheels that were carried there."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from bench import gpu_packages

ROOT = Path(__file__).resolve().parents[2]


def wheel(folder: Path, name: str, tag: str = "py3-none-any") -> None:
    """A package of one module."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as archive:
        archive.writestr(f"{name}.py", "HERE = True\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/RECORD,,\n")


@pytest.fixture
def lacking(monkeypatch):
    """A machine without these two."""
    monkeypatch.setattr(gpu_packages, "IMPORTS", ("sys", "carried_one", "carried_two"))


def test_nothing_is_unpacked_where_nothing_is_lacking(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_packages, "IMPORTS", ("sys",))
    assert gpu_packages.prepare(tmp_path / "absent", tmp_path / "target") == (None, None)


def test_carried_wheels_are_unpacked_into_a_folder_of_their_own(tmp_path, lacking):
    for name in ("carried_one", "carried_two"):
        wheel(tmp_path / "wheels", name)
    target = tmp_path / "target"
    assert gpu_packages.prepare(tmp_path / "wheels", target) == (target, None)
    assert (target / "carried_one.py").read_text() == "HERE = True\n"
    assert "carried_one" not in sys.modules
    assert str(target) not in sys.path


def test_what_is_lacking_is_said(tmp_path, lacking):
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    folder, why = gpu_packages.prepare(wheels, target)
    assert folder is None
    assert why.startswith("carried_one, carried_two cannot be imported; no wheel in wheels")
    wheel(wheels, "carried_one")
    folder, why = gpu_packages.prepare(wheels, target)
    assert folder is None
    assert why == "carried_two cannot be imported, with wheels unpacked"
    wheel(wheels, "carried_two", "cp26-cp26-win32")
    folder, why = gpu_packages.prepare(wheels, target)
    assert folder is None
    assert "not a supported wheel" in why


def test_what_the_trainer_imports_is_named():
    """Its own imports, those inside functions left out: they are of other commands."""
    import ast

    modules = set()
    for path in (ROOT / "python" / "vicreg_jepa").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.split(".")[0])
    modules -= {*sys.stdlib_module_names, "torch", "vicreg_kernels", "vicreg_jepa"}
    assert modules <= set(gpu_packages.IMPORTS)
    assert "pydantic" in modules
