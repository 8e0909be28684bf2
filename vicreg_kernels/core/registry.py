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
    """What a call of an op passes to `choose` where the size that `Sizes.of` names is at least
    `least`.
    """

    least: int
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The sizes that an op's backend depends on: what they are of, and at(name, device, dtype) ->
    the Size of each range, ascending, the first from 0 on.
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
    """Every name that `choose` is asked with."""
    return {name: sizes for choices in OPS.values() for name, sizes in choices.items()}


def choices(name: str, device: torch.device, dtype: torch.dtype) -> list[tuple[int, str]]:
    """The backend that is chosen for `name` where the call names none, as (the least size,
    backend), ascending; the sizes are those that `names()[name].of` says.

    Raises RuntimeError where VICREG_KERNELS_BACKEND names one that cannot run there.
    """
    ranges: list[tuple[int, str]] = []
    for size in names()[name].at(name, device, dtype):
        backend = dispatch.choose(name, None, device, dtype, **size.arguments)
        if not ranges or ranges[-1][1] != backend:
            ranges.append((size.least, backend))
    return ranges
