"""How raw_ops.py spoils one argument of a call: ranks, dtypes, sizes, strides, values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)
FAR = 2**62


def spread(z: Tensor) -> Tensor:
    """The same numbers, each twice as far from the next one."""
    wide = z.new_zeros([2 * n for n in z.shape])
    view = wide[tuple(slice(None, None, 2) for _ in z.shape)]
    return view.copy_(z)


def odd_ones(z: Tensor) -> Tensor:
    """The same numbers, the dimensions of one element with a stride of 3."""
    strides = [3 if n == 1 else s for n, s in zip(z.shape, z.contiguous().stride(), strict=True)]
    return z.contiguous().as_strided(z.shape, strides)


def changed(z: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(kind of change, a tensor that has it)."""
    yield "rank", z[None].clone()
    if z.dim() > 1:
        yield "rank", z.flatten()
    for dtype in (torch.float64, torch.int16, torch.complex64):
        yield "dtype", z.to(dtype)
    if z.dim() == 0:
        yield "size", z.new_zeros(2)
        yield "empty", z.new_zeros(0)
    for d in range(z.dim()):
        if z.shape[d] == 0:
            yield f"size {d}", z.new_zeros([n if i != d else 1 for i, n in enumerate(z.shape)])
            continue
        yield f"size {d}", torch.cat([z, z.narrow(d, 0, 1)], d)
        if z.shape[d] > 1:
            yield f"size {d}", z.narrow(d, 0, z.shape[d] - 1).clone()
        yield f"empty {d}", z.narrow(d, 0, 0).clone()
    if z.dim() > 0 and z.numel() > 1:
        yield "spread", spread(z)
    if 1 in z.shape:
        yield "ones", odd_ones(z)
    if z.dtype in INTEGERS:
        for value in (-1, z.max().item() + 7 if z.numel() else 7, torch.iinfo(z.dtype).max,
                      torch.iinfo(z.dtype).min):  # fmt: skip
            yield "values", torch.full_like(z, value)
            if z.numel() > 1:
                some = z.clone()
                some.view(-1)[-1] = value
                yield "values", some


def variants(argument: Any, value: Any) -> Iterator[tuple[str, Any]]:
    kind = str(argument.type)
    if isinstance(value, Tensor):
        yield from changed(value)
        if kind == "Optional[Tensor]":
            yield "none", None
    elif isinstance(value, list) and value and isinstance(value[0], Tensor):
        yield "shorter", value[:-1]
        yield "longer", [*value, value[0].clone()]
        yield "none", []
        for i in range(len(value)):
            for what, other in changed(value[i]):
                yield what, [*value[:i], other, *value[i + 1 :]]
    elif isinstance(value, list):
        yield "no list", []
        yield "longer", value * 40
        if len(value) > 1:
            yield "shorter", value[:-1]
        for number in (0, -1, FAR) if isinstance(value[0], int) else ():
            yield "values of the list", [*value[:-1], number]
            yield "values of the list", [number, *value[1:]]
    elif isinstance(value, int) and not isinstance(value, bool):
        for number in (-1, 0, FAR, -FAR):
            yield f"int {number}", number
    elif argument.name == "momentum":
        for number in (-0.1, 1.1, float("nan")):
            yield "number", number
