"""Integers from the caller (lengths, offsets, places) as tensors: checked before they are narrowed.

Kernels read int32. An int64 that does not fit is an error where its value can be looked at; on a
device and inside torch.compile it is held at the end of int32's range, so that what was out of
range stays out of range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Integers: TypeAlias = Tensor | Sequence[int]
DTYPES = (torch.int32, torch.int64)
LEAST, MOST = -(2**31), 2**31 - 1
# Values up to which Python's integers are faster than calls of torch.
FEW = 129


def readable(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device and outside of a traced graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def tensor(name: str, values: Integers) -> Tensor:
    """Return `values` as a tensor of int32 or int64. Raises if they are not integers."""
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(values)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            kind = ValueError if isinstance(error, (ValueError, OverflowError)) else TypeError
            if "verflow" in str(error):
                kind = ValueError
            raise kind(f"{name}: got {values!r:.80}, takes integers: {error}") from None
        if values.numel() == 0:
            values = values.long()
    if values.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {values.dtype}, takes int32 or int64")
    return values


def extremes(values: Tensor) -> tuple[int, int]:
    """The minimum and the maximum of readable values; (0, 0) if there are none."""
    if values.numel() <= FEW:
        listed = values.flatten().tolist()
        return min(listed, default=0), max(listed, default=0)
    least, most = torch.stack(values.aminmax()).tolist()
    return least, most


def narrowed(name: str, values: Tensor, least: int = LEAST) -> Tensor:
    """Return `values` as int32 on their device. Raises a ValueError for a readable value below
    `least` or beyond int32. Readable values are copied, so that they cannot change after the check.
    """
    if readable(values):
        low, high = extremes(values)
        if low < least:
            raise ValueError(f"{name}: got {low}, takes integers >= {least}")
        if high > MOST:
            raise ValueError(f"{name}: got {high}, takes integers <= {MOST}")
    return cut(values)


def cut(values: Tensor) -> Tensor:
    """`narrowed` without the check, for values that are already checked or cannot be read."""
    values = values.detach()
    look = readable(values)
    if not look and values.dtype == torch.int64:
        values = values.clamp(LEAST, MOST)
    return lasting(values.to(torch.int32, copy=look).contiguous())


def onto(name: str, values: Tensor, device: torch.device) -> Tensor:
    """Move `values` to `device`. Raises a ValueError for meta tensors, which have no values."""
    if values.is_meta and device.type != "meta":
        raise ValueError(f"{name}: got a meta tensor, takes one with values, or all on meta")
    return values.to(device)


def lasting(values: Tensor) -> Tensor:
    """Return `values`, or a copy if inference mode made them, which autograd cannot save."""
    if torch.compiler.is_compiling() or not values.is_inference():
        return values
    with torch.inference_mode(False):
        return values.clone()
