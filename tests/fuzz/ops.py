"""The public functions that lines are drawn of, found by the files op_*.py: each holds a function
of a Draw by the name of every public function that it makes lines of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

from tests.fuzz.inputs import Draw

# Folders of csrc, beside that of op_<op>.py, whose CPU kernels a composed op runs.
COMPOSED = {"vicregl": ("vicreg", "tokens")}


def _drawn_in(module: ModuleType) -> dict[str, Callable[[Draw], str]]:
    return {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and not name.startswith("_")
    }


_FILES = sorted(path.stem for path in Path(__file__).parent.glob("op_*.py"))
_FOUND = {
    stem.removeprefix("op_"): _drawn_in(import_module(f"tests.fuzz.{stem}")) for stem in _FILES
}
# public function -> what draws a line of it
GENERATORS = {name: draw for drawn in _FOUND.values() for name, draw in drawn.items()}
# public function -> the folders of csrc that hold its CPU kernels
FOLDERS = {name: (op, *COMPOSED.get(op, ())) for op, drawn in _FOUND.items() for name in drawn}
