"""What ema_update_ refuses, before anything is written.

The tensors are looked at twice: all together, which takes some 50 us for 150 of them, and one by
one only when something is wrong, for the message.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import add

import torch
from torch import Tensor

from vicreg_kernels.core import checks as shared
from vicreg_kernels.core import reals
from vicreg_kernels.core.checks import DTYPES

ROUNDINGS = ("nearest", "stochastic")
MOST_STEPS = 2**48
_STRIDED = {torch.strided}


def check_momentum(name: str, value: float) -> None:
    value = reals.real(name, value, "a number in [0, 1]")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: got {value}, takes a number in [0, 1]")


def check_step(value: int) -> None:
    if not 0 <= value < MOST_STEPS:
        raise ValueError(f"step: got {value}, takes an integer in [0, 2^48)")


def check_scalar(name: str, z: Tensor, dtypes: tuple[torch.dtype, ...], device: object) -> None:
    """Check a momentum or step that is a tensor. Its value is checked later, only on the CPU."""
    if z.dim() != 0:
        raise ValueError(f"{name}: got shape {tuple(z.shape)}, takes a 0-d tensor")
    if z.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {z.dtype}, takes one of {dtypes}")
    if z.device.type != "cpu" and z.device != device:
        raise ValueError(f"{name}: got device {z.device}, takes the targets' {device}, or cpu")


def check_rounding(rounding: str, seed: int) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: got {rounding!r}, takes one of {ROUNDINGS}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {type(seed).__name__}, takes an int")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, takes an integer in [0, 2^63)")


def as_list(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tensors, (Tensor, str, dict)):
        raise TypeError(f"{name}: got {type(tensors).__name__}, takes a list of tensors")
    try:
        return list(tensors)
    except TypeError:
        raise TypeError(f"{name}: got {type(tensors).__name__}, takes a list of tensors") from None


def check_lists(targets: list[Tensor], onlines: list[Tensor], shadows: list[Tensor] | None) -> None:
    for name, tensors in (("onlines", onlines), ("shadows", shadows)):
        if tensors is not None and len(tensors) != len(targets):
            raise ValueError(f"{name}: got {len(tensors)} tensors, takes {len(targets)} as targets")
    if torch.compiler.is_compiling() or not _all_well(targets, onlines, shadows or []):
        _name_the_fault(targets, onlines, shadows)


def _all_well(targets: list[Tensor], onlines: list[Tensor], shadows: list[Tensor]) -> bool:
    everything = targets + onlines + shadows
    try:
        shapes = [t.shape for t in targets]  # raises for nested tensors
        return (
            {t.layout for t in everything} == _STRIDED
            and {t.dtype for t in everything}.issubset(DTYPES)
            and len({t.device for t in everything}) == 1
            and shapes == [t.shape for t in onlines]
            and (not shadows or shapes == [t.shape for t in shadows])
            and not any([t.requires_grad and not t.is_leaf for t in targets + shadows])
        )
    except (AttributeError, RuntimeError, TypeError):
        return False


def _name_the_fault(
    targets: list[Tensor], onlines: list[Tensor], shadows: list[Tensor] | None
) -> None:
    for i in range(len(targets)):
        for name, tensors in (("targets", targets), ("onlines", onlines), ("shadows", shadows)):
            if tensors is not None:
                _check_one(f"{name}[{i}]", tensors[i], name, i, targets)


def _check_one(what: str, z: Tensor, name: str, i: int, targets: list[Tensor]) -> None:
    shared.is_tensor(what, z)
    if z.is_nested or z.layout != torch.strided:
        layout = "nested" if z.is_nested else z.layout
        raise TypeError(f"{what}: got layout {layout}, takes a dense (strided) tensor")
    shared.float_dtype(what, z.dtype)
    if z.shape != targets[i].shape:
        raise ValueError(
            f"{what}: got shape {tuple(z.shape)}, takes targets[{i}]'s {tuple(targets[i].shape)}"
        )
    if z.device != targets[0].device:
        raise ValueError(
            f"{what}: got device {z.device}, takes targets[0]'s {targets[0].device}"
            " (one call a device)"
        )
    if name != "onlines" and z.requires_grad and not z.is_leaf:
        raise ValueError(
            f"{what}: got the result of a differentiable operation, takes a leaf, as optimizers do"
        )


def _span(z: Tensor) -> int:
    """Bytes from the first to past the last element."""
    if z.numel() == 0:
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(z.shape, z.stride(), strict=True))
    return (reach + 1) * z.element_size()


def _overlaps_itself(z: Tensor) -> bool:
    """Whether two elements may lie at one place: never wrong where it says no."""
    reach = 1
    for stride, size in sorted(zip(z.stride(), z.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def check_overlap(
    targets: Sequence[Tensor], onlines: Sequence[Tensor], shadows: Sequence[Tensor]
) -> None:
    """Written memory may be no other tensor's: the result would depend on the order of the work."""
    count = len(targets)
    everything = [*targets, *onlines, *shadows]
    simple = all([z.is_contiguous() for z in everything])
    for name, tensors in (("targets", targets), ("shadows", shadows)):
        for i, z in enumerate(() if simple else tensors):
            if z.numel() and _overlaps_itself(z):
                raise ValueError(
                    f"{name}[{i}]: got strides {z.stride()} for shape {tuple(z.shape)},"
                    " takes a tensor whose elements do not share memory (not an expanded one)"
                )
    begins = [z.data_ptr() for z in everything]
    sizes = [z.nbytes for z in everything] if simple else [_span(z) for z in everything]
    ends = list(map(add, begins, sizes))
    spans = sorted(zip(begins, ends, strict=True))
    if all([end <= begin for (_, end), (begin, _) in pairwise(spans)]):
        return
    reach, reaching = 0, -1  # the furthest end of written memory so far, and whose it is
    read, reading = 0, -1  # the same of memory that is only read
    for k in sorted(range(len(begins)), key=begins.__getitem__):
        begin, end = begins[k], ends[k]
        if end == begin:
            continue
        written = k < count or k >= 2 * count
        if begin < reach or (written and begin < read):
            other = reaching if begin < reach else reading
            first, second = (_named(x, count) for x in sorted((k, other)))
            raise ValueError(
                f"{second}: got memory that overlaps {first}'s, takes tensors of their own"
                " (give tied parameters once, and the teacher a copy)"
            )
        if written and end > reach:
            reach, reaching = end, k
        elif not written and end > read:
            read, reading = end, k


def _named(k: int, count: int) -> str:
    return f"{('targets', 'onlines', 'shadows')[k // count]}[{k % count}]"
