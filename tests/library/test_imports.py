"""The reader of imports that the tests of the layout and the drawn architecture stand on."""

from __future__ import annotations

import pytest

from tests.helpers import imports

FILES = {
    "pack/__init__.py": "from pack.api import run\n",
    "pack/api.py": "import os\nimport pack.inner.deep\nfrom .inner import tools as t\n",
    "pack/inner/__init__.py": "",
    "pack/inner/deep.py": "from . import tools\nfrom ..base import thing\n",
    "pack/inner/tools.py": "def f():\n    from pack import base\n",
    "pack/base.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pack.api\n",
}


@pytest.fixture
def graph(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return imports.modules(tmp_path, "pack")


def test_every_kind_of_import_is_read(graph):
    assert graph == {
        "pack": {"pack.api"},
        "pack.api": {"pack.inner.deep", "pack.inner.tools"},
        "pack.inner": set(),
        "pack.inner.deep": {"pack.inner.tools", "pack.base"},
        "pack.inner.tools": {"pack.base"},
        "pack.base": set(),
    }


def test_rooms_floors_and_shortcuts(graph):
    rooms = imports.rooms(graph, lambda name: ".".join(name.split(".")[:2]))
    assert rooms["pack.inner"] == {"pack.base"}
    assert imports.cycles(rooms) == []
    floors = {"pack.base": 0, "pack.inner": 1, "pack.api": 2, "pack": 3}
    assert imports.floors(rooms) == floors
    shortcut = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert imports.without_shortcuts(shortcut) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_a_circle_is_found():
    assert imports.cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]
