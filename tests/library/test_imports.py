"""The reader of imports that the tests of the layout and the drawn architecture stand on."""

from __future__ import annotations

import ast
import builtins
import importlib.util
from collections.abc import Iterator
from pathlib import Path

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


TESTS = Path(__file__).resolve().parents[1]
ON_PURPOSE = {
    "torchvision.ops",
    "torchvision.transforms",
    "torchft.coordination",
    "no_such_module",
    "not_installed",
}  # of tests of what is not there


def programs(file: Path) -> Iterator[ast.Module]:
    """The strings of a test file that are programs: those for processes of their own."""
    for node in ast.walk(ast.parse(file.read_text())):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and "import " in node.value
        ):
            try:
                yield ast.parse(node.value)
            except SyntaxError:
                continue  # prose, or part of a program


def missing(program: ast.Module) -> Iterator[str]:
    for node in ast.walk(program):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            own = name.partition(".")[0] in ("tests", "bench", "vicreg_kernels")
            if importlib.util.find_spec(name if own else name.partition(".")[0]) is None:
                yield name


def undefined(program: ast.Module) -> Iterator[str]:
    """Names that are read and bound nowhere in a program that runs a test's helpers; others may be
    the middle of a program.
    """
    if not any(isinstance(n, ast.ImportFrom) and n.module == "tests.helpers" for n in program.body):
        return
    bound, read = set(dir(builtins)), set()
    for node in ast.walk(program):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    yield from read - bound - {"__file__", "__name__"}


def test_programs_in_strings_know_their_names():
    """What moves is seen in them by no tool, and some run in `make audit` alone."""
    unknown = {}
    for file in {*TESTS.rglob("*.py")} - {Path(__file__).resolve()}:
        names = {name for each in programs(file) for name in (*missing(each), *undefined(each))}
        if names - ON_PURPOSE:
            unknown[file.relative_to(TESTS).as_posix()] = sorted(names - ON_PURPOSE)
    assert unknown == {}
