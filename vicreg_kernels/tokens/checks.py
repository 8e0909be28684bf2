"""What is checked of the arguments, and where.

Shapes, dtypes, devices and settings are checked in Python, as functions of plain values whose
results are kept (`calls.remembered`). What needs the values (indices in range, offsets that
fit, no token twice) is checked in every call with CPU tensors, by the kernels themselves where they
are compiled, so also under torch.compile. On a GPU it would wait for the device: there it is
checked where VICREG_KERNELS_DEBUG=1; without it no kernel reads or writes out of bounds, and a row
whose index is out of range becomes NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vicreg_kernels.core import checks as shared
from vicreg_kernels.core import dispatch, integers
from vicreg_kernels.core.checks import Seen

MOST_TOKENS = 2**63
Offsets: TypeAlias = integers.Integers


def each(seen: Sequence[Any]) -> list[Seen]:
    """Split the joined results of `calls.seen`, one for each tensor."""
    return [tuple(seen[at : at + 4]) for at in range(0, len(seen), 4)]


def tensor(name: str, z: Seen, dims: tuple[int, ...], shapes: str) -> None:
    """Check that z is a dense float tensor whose number of dimensions is one of `dims`."""
    shape, dtype, _, layout = z
    shared.dense_float(name, dtype, layout)
    if len(shape) not in dims:
        raise ValueError(f"{name}: got shape {tuple(shape)}, takes {shapes}")


def index(name: str, z: Seen, packed: bool, shapes: str, device: torch.device) -> None:
    """Check integers, [B, K] or, if packed, [total]. shapes: the shape that is expected."""
    shape, dtype, place, _ = z
    if dtype not in integers.DTYPES:
        raise TypeError(f"{name}: got dtype {dtype}, takes int32 or int64")
    if len(shape) != (1 if packed else 2):
        raise ValueError(f"{name}: got shape {tuple(shape)}, takes {shapes}")
    same_device(name, place, device)


def same_device(name: str, got: torch.device, device: torch.device) -> None:
    shared.same_device(name, got, device, "that of the others,")


def offsets(name: str, given: Offsets, batch: int | None, total: int, like: Tensor) -> Tensor:
    """Return `given` as an int64 tensor on the device of `like`; check it if it is on the host."""
    on_host = not isinstance(given, Tensor) or given.device.type == "cpu"
    made = integers.tensor(name, given)
    if made.dim() != 1 or made.shape[0] < 2:
        raise ValueError(f"{name}: got shape {tuple(made.shape)}, takes [B + 1], B at least 1")
    if batch is not None and made.shape[0] != batch + 1:
        raise ValueError(f"{name}: got {made.shape[0]} numbers, takes B + 1 = {batch + 1}")
    if made.is_meta and like.device.type != "meta":
        raise ValueError(f"{name}: got a meta tensor, takes one with values, or all on meta")
    made = made.to(torch.int64).contiguous()
    if on_host and not torch.compiler.is_compiling():
        offset_values(name, made, total)
    return made if made.device == like.device else made.to(like.device, non_blocking=True)


def offset_values(name: str, z: Tensor, total: int) -> None:
    values = z.tolist()
    if values[0] != 0:
        raise ValueError(f"{name}: got {values[0]} first, takes 0")
    for before, after in pairwise(values):
        if after < before:
            raise ValueError(f"{name}: got {after} after {before}, takes numbers that never fall")
    if values[-1] != total:
        raise ValueError(f"{name}: got {values[-1]} last, takes the number of packed rows, {total}")


def wanted(backend: str, z: Tensor) -> bool:
    """Whether values are checked here; the compiled CPU kernels check them by themselves."""
    if torch.compiler.is_compiling():
        return False
    return backend != "cpu" and (dispatch.DEBUG or z.device.type == "cpu")


def index_values(name: str, z: Tensor, length: int) -> None:
    if z.numel() == 0:
        return
    low, high = z.min().item(), z.max().item()
    if low < 0 or high >= length:
        bad = low if low < 0 else high
        raise ValueError(
            f"{name}: got {bad}, takes 0 to {length - 1} (the sample has {length} tokens)"
        )


def unique(name: str, z: Tensor, ids: Tensor | None) -> None:
    """Check that no sample names a token twice. z: [P, K], or packed [R] with the samples' ids."""
    if ids is None:
        ordered = z.sort(dim=1).values
        twice = ordered[:, 1:] == ordered[:, :-1]
        values = ordered[:, 1:]
    else:
        keys = ids * (z.max() + 1 if z.numel() else 1) + z
        place = keys.argsort()
        twice, values = keys[place][1:] == keys[place][:-1], z[place][1:]
    if twice.any():
        raise ValueError(
            f"{name}: got {values[twice][0].item()} twice in one sample, takes each token once"
        )
