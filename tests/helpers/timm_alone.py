"""timm where torchvision is not installed: it imports it at its top, and its ViTs do not use it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench import peers


@contextmanager
def importable() -> Iterator[None]:
    """A context in which timm can be imported; the test is skipped where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    with peers.without_torchvision("timm", "vicreg_kernels.integrations.timm"):
        yield
