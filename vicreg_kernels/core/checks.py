"""Checks that several ops make of their tensors and settings, in the words "got X, takes Y"."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from vicreg_kernels.core import dispatch

DTYPES = (torch.float64, *dispatch.FUSED_DTYPES)
PRECISIONS = (None, "tf32x3")
# A tensor as a remembered check sees it (`calls.seen`): shape, dtype, device and layout.
Seen: TypeAlias = tuple[torch.Size, torch.dtype, torch.device, torch.layout]


def is_tensor(name: str, z: Any) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name}: got {type(z).__name__}, takes a torch.Tensor")


def float_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {dtype}, takes float32, bfloat16, float16 or float64")


def dense_float(
    name: str, dtype: torch.dtype, layout: torch.layout, kinds: str = "dense (strided)"
) -> None:
    """Raise a TypeError unless the tensor is dense and of a dtype that the ops take."""
    float_dtype(name, dtype)
    if layout != torch.strided:
        raise TypeError(f"{name}: got layout {layout}, takes a {kinds} tensor")


def not_empty(name: str, shape: torch.Size) -> None:
    if shape.numel() == 0:
        raise ValueError(f"{name}: got no elements (shape {tuple(shape)})")


def same_dtype(name: str, got: torch.dtype, dtype: torch.dtype, whose: str) -> None:
    if got != dtype:
        raise TypeError(f"{name}: got dtype {got}, takes {whose} {dtype}")


def same_device(name: str, got: torch.device, device: torch.device, whose: str) -> None:
    if got != device:
        raise ValueError(f"{name}: got device {got}, takes {whose} {device}")


def same_as_x(y: Seen, x: Seen) -> None:
    """Raise unless the second view has the first one's shape, dtype and device."""
    if y[0] != x[0]:
        raise ValueError(f"y: got shape {tuple(y[0])}, takes x's shape {tuple(x[0])}")
    same_dtype("y", y[1], x[1], "x's dtype")
    same_device("y", y[2], x[2], "x's device")


def precision(asked: str | None, process_group: object = None) -> None:
    """Raise a ValueError unless these products exist, on one process or over a group."""
    if asked not in PRECISIONS:
        raise ValueError(f"precision: got {asked!r}, takes one of {PRECISIONS}")
    if asked is not None and process_group is not None:
        raise ValueError(
            f"precision: got {asked!r} with a process_group, whose products are torch's own and"
            " follow torch.set_float32_matmul_precision; takes None there"
        )
