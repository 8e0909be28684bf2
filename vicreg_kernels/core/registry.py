"""The one list of the ops, and of the names that `dispatch.choose` is asked with.

Each op's contract.py adds its own line. The command line reads it; the benchmarks and the tests,
which a process without torch may ask, find the same ops by their contract.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vicreg_kernels.core import dispatch


@dataclass(frozen=True)
class Size:
    """The arguments of `choose` for calls whose size, named by `Sizes.of`, is at least `least`."""

    least: int
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The sizes that an op's backend depends on. of: what is measured; at: a function of (name,
    device, dtype) that returns the Size of each range, in ascending order, the first from 0.
    """

    of: str
    at: Callable[[str, torch.device, torch.dtype], list[Size]]


def _square(name: str, device: torch.device, dtype: torch.dtype) -> list[Size]:
    least = dispatch.triton_from(name, device.index, dtype) if device.type == "cuda" else math.inf
    return [Size(at, {"side": at}) for at in (0, int(least) if least != math.inf else 0)]


# For ops that pass the edge of their square matrix as `side`, and for those of any size.
SQUARE = Sizes("min(N, D)", _square)
ANY_SIZE = Sizes("", lambda name, device, dtype: [Size(0, {})])

# op, which is its folder's name -> the names that `choose` is asked with, and their sizes.
OPS: dict[str, dict[str, Sizes]] = {}


def register(op: str, **choices: Sizes) -> None:
    OPS[op] = choices


def names() -> dict[str, Sizes]:
    """All names that are passed to `choose`."""
    return {name: sizes for choices in OPS.values() for name, sizes in choices.items()}


def choices(name: str, device: torch.device, dtype: torch.dtype) -> list[tuple[int, str]]:
    """The backends that are chosen for `name` if the call names none, as (least size, backend) in
    ascending order; `names()[name].of` says which size.

    Raises RuntimeError if VICREG_KERNELS_BACKEND names a backend that cannot run there.
    """
    ranges: list[tuple[int, str]] = []
    for size in names()[name].at(name, device, dtype):
        backend = dispatch.choose(name, None, device, dtype, **size.arguments)
        if not ranges or ranges[-1][1] != backend:
            ranges.append((size.least, backend))
    return ranges
