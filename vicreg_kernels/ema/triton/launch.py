"""The launcher of the EMA op's Triton kernel: one launch for all tensors of one pair of dtypes.

A launch cannot take hundreds of pointers, so those of a call lie in one small table on the device,
which is built at the first call with these tensors (a copy of some KB from the host) and kept for
the next ones. A captured CUDA graph reads the table at each replay, so one that a capture has used
is never freed; a capture that finds none is an error, because its copy could not be replayed. GPU
times: not measured yet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels.core.triton.device import on_device
from vicreg_kernels.ema.reference import memory_order
from vicreg_kernels.ema.triton.kernel import update_kernel

BLOCK = 4096  # elements a program: 16 a thread, 64 bytes and more in flight
OTHER_BLOCK = 1024
WARPS = 8
_KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SHADOWS = {dtype: code for code, dtype in enumerate(_KINDS, start=1)}  # 0: there is none
VECTOR = 8  # elements that two or one 16-byte accesses take, whatever the dtype
FIELDS = 7  # of a row before its dims
_MOST_TABLES = 16


def _dims(target: Tensor, online: Tensor, shadow: Tensor | None) -> list[tuple[int, ...]]:
    """(size, strides of the three), the innermost first, merged; [] for one run of memory."""
    third = target if shadow is None else shadow
    dims: list[tuple[int, ...]] = []
    for d in reversed(memory_order(target)):
        size = target.shape[d]
        if size == 1:
            continue
        strides = (target.stride(d), online.stride(d), third.stride(d))
        if dims and all(a == dims[-1][0] * b for a, b in zip(strides, dims[-1][1:], strict=True)):
            dims[-1] = (dims[-1][0] * size, *dims[-1][1:])
        else:
            dims.append((size, *strides))
    return [] if dims in ([], [(target.numel(), 1, 1, 1)]) else dims


class Launch(NamedTuple):
    """Tensors of one pair of dtypes and one kind of layout: where their rows and the places of the
    launch's programs begin in the table, how many programs there are, and the rows' dims.
    """

    kinds: tuple[str, str]
    aligned: bool
    strided: bool
    rows: int
    blocks: int
    programs: int
    dims: int


# What a launch is about: target's and online's kind, aligned, strided; and a tensor's row.
Work = tuple[tuple[tuple[str, str], bool, bool], tuple[int, ...]]
Made = tuple[Tensor, list[Launch]]


class _Tables:
    """The tables of the last calls, and for good those that a CUDA graph has captured."""

    def __init__(self) -> None:
        self.recent: OrderedDict[Any, Made] = OrderedDict()
        self.captured: dict[Any, Made] = {}

    def find(self, work: tuple[Work, ...], blocks: tuple[int, int], device: torch.device) -> Made:
        """blocks: elements a program, aligned and not."""
        key = (device, blocks, work)
        on_gpu = device.type == "cuda"
        capturing = on_gpu and torch.cuda.is_current_stream_capturing()
        made = self.captured.get(key) or self.recent.get(key)
        if made is None:
            if capturing:
                raise RuntimeError(
                    "ema_update_ with backend='triton' inside a CUDA graph capture: call it with"
                    " these tensors once before the capture, which cannot copy their addresses"
                )
            made = _make_table(work, blocks, device)
            self.recent[key] = made
            if len(self.recent) > _MOST_TABLES:
                self.recent.popitem(last=False)
        elif capturing:
            self.captured[key] = made
        else:
            if key in self.recent:
                self.recent.move_to_end(key)
            if on_gpu:
                made[0].record_stream(torch.cuda.current_stream(device))
        return made


def _make_table(work: tuple[Work, ...], blocks: tuple[int, int], device: torch.device) -> Made:
    """int64, for each launch: its rows, dims filled up with ones of size 1, and for each of its
    programs row << 32 | block of elements.
    """
    parts: list[Tensor] = []
    launches = []
    begin = 0
    for (kinds, aligned, strided), group in groupby(
        sorted(work, key=lambda item: item[0]), key=lambda item: item[0]
    ):
        rows = [row for _, row in group]
        length = max(map(len, rows))
        table = torch.tensor([[*r, *(1, 0, 0, 0) * ((length - len(r)) // 4)] for r in rows])
        block = blocks[not aligned]
        counts = (table[:, 3] + block - 1) // block
        row = torch.arange(len(rows)).repeat_interleave(counts)
        place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        parts += [table.flatten(), row << 32 | place]
        middle = begin + table.numel()
        launches.append(
            Launch(kinds, aligned, strided, begin, middle, len(row), (length - FIELDS) // 4)
        )
        begin = middle + len(row)
    return torch.cat(parts).to(device), launches


_tables = _Tables()


def update_(
    targets: Sequence[Tensor],
    onlines: Sequence[Tensor],
    shadows: Sequence[Tensor],
    momentum_tensor: Tensor | None,
    momentum: float,
    stochastic: bool,
    seed: int,
    step_tensor: Tensor | None,
    step: int,
) -> None:
    """As reference.update."""
    work: list[Work] = []
    for index, (target, online) in enumerate(zip(targets, onlines, strict=True)):
        if target.numel() == 0:
            continue
        shadow = shadows[index] if shadows else None
        three = (target, online, target if shadow is None else shadow)
        dims: list[tuple[int, ...]] = []
        if not all(z.is_contiguous() for z in three):
            dims = _dims(target, online, shadow)
        addresses = [z.data_ptr() for z in three]
        kinds = _KINDS[target.dtype], _KINDS[online.dtype]
        copied = 0 if shadow is None else SHADOWS[shadow.dtype]
        whole = 0  # elements that vectors take
        if not dims and all(address % 16 == 0 for address in addresses):
            whole = target.numel() // VECTOR * VECTOR
        if whole:
            work.append(((kinds, True, False), (*addresses, whole, index, 0, copied)))
        if whole < target.numel():
            rest = [a + whole * z.element_size() for a, z in zip(addresses, three, strict=True)]
            flat = tuple(number for dim in dims for number in dim)
            row = (*rest, target.numel() - whole, index, whole, copied, *flat)
            work.append(((kinds, False, bool(dims)), row))
    if not work:
        return
    device = targets[0].device
    near = 1.0 - momentum < 0.5
    with on_device(targets[0]):
        table, launches = _tables.find(tuple(work), (BLOCK, OTHER_BLOCK), device)
        for launch in launches:
            update_kernel[(launch.programs,)](
                table,
                table if momentum_tensor is None else momentum_tensor,
                table if step_tensor is None else step_tensor,
                1.0 - momentum if near else -momentum,
                int(near),
                seed,
                step,
                launch.rows,
                launch.blocks,
                launch.dims,
                TARGET=launch.kinds[0],
                ONLINE=launch.kinds[1],
                STOCHASTIC=stochastic and launch.kinds[0] != "fp32",
                DEVICE_MOMENTUM=momentum_tensor is not None,
                DEVICE_STEP=step_tensor is not None and stochastic and launch.kinds[0] != "fp32",
                ALIGNED=launch.aligned,
                BLOCK=BLOCK if launch.aligned else OTHER_BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
