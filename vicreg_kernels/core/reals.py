"""Settings that are numbers: read as such, or refused by name."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

# What stands for a number while torch.compile traces.
_SYMBOLS = (torch.SymInt, torch.SymFloat)


def real(name: str, value: Any, takes: str) -> Any:
    """value, a number of Python, of numpy or in a tensor of one element, as Python's.

    A tensor that requires a gradient is refused, for none would reach it. One on a GPU is waited
    for. Raises a TypeError that names the setting and says what it takes.
    """
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError(
                f"{name}: got a tensor that requires a gradient, which none would reach; takes "
                f"{takes}"
            )
        if value.numel() == 1 and not value.is_complex():
            return value.item()
        raise TypeError(f"{name}: got a tensor of shape {tuple(value.shape)}, takes {takes}")
    if isinstance(value, _SYMBOLS):
        return value
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), takes {takes}")


def finite(name: str, value: Any, least: float | None = None, also: str = "") -> Any:
    """value as `real` reads it, finite and at least `least`; `also` is what the setting takes
    besides ("or None"), for the message. Raises a TypeError or ValueError that names the setting.
    """
    takes = "a finite number" if least is None else f"a finite number >= {least:g}"
    takes += also
    read = real(name, value, takes)
    if not (-math.inf if least is None else least) <= read < math.inf or read == -math.inf:
        raise ValueError(f"{name}: got {read}, takes {takes}")
    return read
