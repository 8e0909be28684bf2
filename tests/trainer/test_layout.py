"""The folders of the trainer depend on each other in one direction only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import imports

PYTHON = Path(__file__).resolve().parents[2] / "python"
# The highest floors that a file and a folder may have: more means longer chains to read.
MOST_FILE_FLOORS, MOST_FOLDER_FLOORS = 18, 11


@pytest.fixture(scope="module")
def files() -> imports.Graph:
    return imports.modules(PYTHON, "vicreg_jepa")


@pytest.fixture(scope="module")
def folders(files) -> imports.Graph:
    return imports.rooms(files, lambda name: ".".join(name.split(".")[:2]))


def test_no_import_goes_in_a_circle(files, folders):
    assert imports.cycles(files) == []
    assert imports.cycles(folders) == []


def test_the_floors_are_held(files, folders):
    assert max(imports.floors(files).values()) <= MOST_FILE_FLOORS
    assert max(imports.floors(folders).values()) <= MOST_FOLDER_FLOORS


def test_every_folder_says_what_is_in_it():
    for folder in {path.parent for path in (PYTHON / "vicreg_jepa").rglob("*.py")}:
        text = (folder / "__init__.py").read_text(encoding="utf-8")
        assert text.startswith('"""'), folder
