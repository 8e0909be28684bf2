"""The other libraries' own modules, where they can be imported.

lightly imports torchvision at its top, for ops that no test here calls. Where torchvision is not
installed, an empty one stands in while lightly's modules are in use, and is gone with them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from vicreg_kernels.compat import patching

# What each library's objects are got from: its name -> the object.
Get = Callable[[str], Any]


class _Empty(ModuleType):
    """A module that has a class for every name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        part = sys.modules.get(f"{self.__name__}.{name}")
        return type(name, (torch.nn.Module,), {}) if part is None else part


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty torchvision, and no timm, which would want more of it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        root = name.partition(".")[0]
        if root == "timm":
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
        return ModuleSpec(name, self, is_package=True) if root == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def importable(peer: str) -> Iterator[None]:
    """A context in which the peer can be imported, if it is installed."""
    if peer == "pytorch_metric_learning" or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    package = patching.PACKAGES[peer]
    before = dict(sys.modules)
    finder = _StandIn()
    sys.meta_path.insert(0, finder)
    for name in [name for name in before if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what others left; an outer context keeps its own objects
    # lightly's own models, which no test needs, are left out where this is missing.
    sys.modules["torchvision.models.vision_transformer"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in list(sys.modules):
            root = name.partition(".")[0]
            if root == "torchvision" or (root == package and name not in before):
                del sys.modules[name]


def ours(peer: str) -> Get:
    module = importlib.import_module(f"vicreg_kernels.compat.{peer}")
    return lambda name: getattr(module, name)


def theirs(peer: str) -> Get:
    """Within `importable`; raises ImportError where the peer is not installed."""
    compat = importlib.import_module(f"vicreg_kernels.compat.{peer}")
    homes = {name: importlib.import_module(home) for name, home in compat.HOMES.items()}
    return lambda name: getattr(homes[name], name)
