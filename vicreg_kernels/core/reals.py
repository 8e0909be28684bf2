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
    """Return `value`, a number of Python or numpy or a tensor of one element, as a Python number.

    A tensor that requires a gradient is refused, because no gradient would reach it. A tensor on a
    GPU is waited for. Raises a TypeError that names the setting and says what it takes.
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


def finite(
    name: str, value: Any, least: float | None = None, also: str = "", most: float = math.inf
) -> Any:
    """Return `value` as `real` does, if it is finite, at least `least` and at most `most`. `also`
    tells in the message what else the setting takes ("or None"). Raises a TypeError or ValueError
    that names the setting.
    """
    takes = "a finite number" if least is None else f"a finite number >= {least:g}"
    if most < math.inf:
        takes += f" and <= {most:g}"
    takes += also
    read = real(name, value, takes)
    lowest = -math.inf if least is None else least
    if not (lowest <= read <= most and -math.inf < read < math.inf):
        raise ValueError(f"{name}: got {read}, takes {takes}")
    return read


def margin(value: Any) -> Any:
    """Check a margin. Above 1e15, float32 may not hold the sum of squares of such deviations."""
    return finite("margin", value, 0, most=1e15)
