"""Checks of settings: each raises ValueError with the name, the value and what is taken."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """An integer of at least `least`, at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: got {value!r}, takes an integer")
    if value < least or (most is not None and value > most):
        takes = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: got {value}, takes {takes}")


def number(
    name: str, value: Any, least: float = 0.0, most: float = math.inf, open_low: bool = False
) -> None:
    """A finite number of at least `least` (more than it if open_low), at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: got {value!r}, takes a number")
    low = value > least if open_low else value >= least
    if not (low and value <= most and math.isfinite(value)):
        takes = f"more than {least:g}" if open_low else f"{least:g} or more"
        takes += f", at most {most:g}" if math.isfinite(most) else ""
        raise ValueError(f"{name}: got {value}, takes {takes}")


def choice(name: str, value: Any, takes: tuple[Any, ...]) -> None:
    if value not in takes:
        raise ValueError(f"{name}: got {value!r}, takes {', '.join(map(repr, takes))}")


def shaped(name: str, value: Any, *shape: int | None) -> None:
    """A tensor of a shape, in which None stands for any size."""
    takes = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: got {type(value).__name__}, takes a tensor {takes}")
    sizes = tuple(value.shape)
    if len(sizes) != len(shape) or any(
        size is not None and size != its for size, its in zip(shape, sizes, strict=True)
    ):
        raise ValueError(f"{name}: got shape {list(sizes)}, takes {takes}")


def finite(name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: got values that are not finite, takes finite numbers")
