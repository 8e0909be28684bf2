"""The other libraries' own modules, where they can be imported.

lightly and timm import torchvision at their top, for ops that no test here calls. Where torchvision
is not installed, an empty one stands in while their modules are in use, and is gone with them.
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


class _Any(type):
    """A class that has another one for every name, such as the members of an enum."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Any(name, (), {})


class _Module(torch.nn.Module, metaclass=_Any):
    pass


class _Empty(ModuleType):
    """A module that has a class for every name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        part = sys.modules.get(f"{self.__name__}.{name}")
        return type(name, (_Module,), {}) if part is None else part


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty torchvision, and not what is hidden."""

    def __init__(self, hidden: tuple[str, ...]) -> None:
        self.hidden = hidden

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        root = name.partition(".")[0]
        if root in self.hidden:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
        return ModuleSpec(name, self, is_package=True) if root == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def importable(peer: str) -> Iterator[None]:
    """A context in which the peer can be imported, if it is installed."""
    if peer == "pytorch_metric_learning":
        yield
        return
    # timm would be imported by lightly's models, which no test needs, as they are where a part of
    # torchvision is missing
    absent = ("torchvision.models.vision_transformer",)
    hidden = ("timm",) if peer == "lightly" else ()
    with without_torchvision(patching.PACKAGES[peer], hidden=hidden, absent=absent):
        yield


@contextlib.contextmanager
def without_torchvision(
    *packages: str, hidden: tuple[str, ...] = (), absent: tuple[str, ...] = ()
) -> Iterator[None]:
    """A context in which packages that import torchvision can be imported where it is not
    installed. Beside the stand-in, their modules that were imported inside are gone afterwards.

    packages: with dots, modules. hidden: packages that are not found inside. absent: modules of
    torchvision that are not there.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    before = dict(sys.modules)
    finder = _StandIn(hidden)
    sys.meta_path.insert(0, finder)
    for name in [name for name in before if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what others left; an outer context keeps its own objects
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in list(sys.modules):
            of_peer = any(f"{name}.".startswith(f"{package}.") for package in packages)
            if name.partition(".")[0] == "torchvision" or (of_peer and name not in before):
                del sys.modules[name]


def ours(peer: str) -> Get:
    module = importlib.import_module(f"vicreg_kernels.compat.{peer}")
    return lambda name: getattr(module, name)


def theirs(peer: str) -> Get:
    """Within `importable`; raises ImportError where the peer is not installed."""
    compat = importlib.import_module(f"vicreg_kernels.compat.{peer}")
    homes = {name: importlib.import_module(home) for name, home in compat.HOMES.items()}
    return lambda name: getattr(homes[name], name)
