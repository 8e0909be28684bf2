"""timm where torchvision is not installed: it imports it at its top, and its ViTs do not use it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest

_OF_TORCHVISION = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets")
_OF_TIMM = ("timm", "vicreg_kernels.integrations.timm")


@contextmanager
def importable() -> Iterator[None]:
    """A context in which timm can be imported; the test is skipped where it is not installed.

    Beside a stand-in of torchvision, what was imported inside is gone afterwards.
    """
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    before = dict(sys.modules)
    for name in (f"torchvision{part}" for part in _OF_TORCHVISION):
        sys.modules[name] = MagicMock(__path__=[], __spec__=ModuleSpec(name, None))
    try:
        yield
    finally:
        for name in list(sys.modules):
            ours = any(name == each or name.startswith(f"{each}.") for each in _OF_TIMM)
            if name.partition(".")[0] == "torchvision" or (ours and name not in before):
                del sys.modules[name]
                if name in before:
                    sys.modules[name] = before[name]
