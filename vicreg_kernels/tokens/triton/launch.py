"""Launchers of the tokens ops' Triton kernels; `contract.py` says what each takes and returns.

Launches: gather, assembly and its order 1 each, scatter 3 (the map's fill, the map, the rows), the
loss 2 forward and 1 backward, a column sum 2. Nothing waits for the device, and allocation depends
on shapes alone, so all can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vicreg_kernels.core.triton.device import device_of, on_device, rounds_by_hand
from vicreg_kernels.core.triton.sums import finish_kernel
from vicreg_kernels.core.units import unit as unit_of
from vicreg_kernels.tokens import contract
from vicreg_kernels.tokens.triton.assembly import (
    assemble_kernel,
    column_finish_kernel,
    column_kernel,
    order_kernel,
)
from vicreg_kernels.tokens.triton.loss import gradient_kernel, loss_kernel
from vicreg_kernels.tokens.triton.rows import gather_kernel, map_kernel, scatter_kernel, sum_kernel

# The loss keeps a row in registers: 64 elements a thread of 16 warps.
LONGEST_ROW = 32768


def _columns(dim: int, most: int = 2048) -> dict[str, int]:
    """A block of columns, and warps for 8 elements a thread. Fewer than 256 would be kernels of
    their own, and hardly faster: they are masked in the loads of one warp.
    """
    block = max(256, min(triton.next_power_of_2(dim), most))
    return {"BLOCK": block, "num_warps": min(16, block // 256)}


def _samples(index: Tensor, offsets: Tensor | None, batch: int) -> tuple[Tensor, tuple[int, int]]:
    """(offsets or a stand-in, rows a sample and steps of sample_of)."""
    each = max(1, index.shape[-1])
    if offsets is None:
        return index, (each, 0)
    return offsets, (each, max(1, batch - 1).bit_length())


def _in_units(dim: int, *rows: tuple[Tensor, Sequence[int]]) -> tuple[int, int, list[int]]:
    """(unit, dim in it, strides in it but for those of columns). rows: tensors, and each one's
    strides of group, row and column.
    """
    tensors, places = zip(*rows, strict=True)
    smaller = min(tensors, key=Tensor.element_size)
    wide = [s for *both, _ in places for s in both]
    unit = unit_of(smaller, (dim, *wide), [place[2] for place in places], tensors)
    return unit, dim // unit, [s for a, b, step in places for s in (a // unit, b // unit, step)]


def _place(z: Tensor) -> tuple[int, int, int, int]:
    """(rows a group, strides of group, row and column) of [P, K, D] or [R, D]."""
    if z.dim() == 2:
        return max(1, z.shape[0]), 0, *z.stride()
    return max(1, z.shape[1]), *z.stride()


def gather(x: Tensor, index: Tensor, offsets: Tensor | None) -> Tensor:
    dim = x.shape[2]
    out = x.new_empty((*index.shape, dim))
    if index.numel() == 0:
        return out
    at, each = _samples(index, offsets, x.shape[0])
    unit, width, strides = _in_units(dim, (x, x.stride()))
    with on_device(x):
        gather_kernel[(index.numel(),)](
            x, index, at, out, x.shape[1], width, x.shape[0], *each, *strides,
            UNIT=unit, **_columns(dim),
        )  # fmt: skip
    return out


def scatter(
    rows: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    batch: int,
    length: int,
    fill: float,
    accumulate: bool,
    reduce: bool,
) -> Tensor:
    dim, count, slots = rows.shape[-1], index.numel(), batch * length
    out = rows.new_empty((length, dim) if reduce else (batch, length, dim))
    at, each = _samples(index, offsets, batch)
    row_each, *place = _place(rows)
    unit, width, strides = _in_units(dim, (rows, place))
    with on_device(rows):
        maps = torch.full((2, slots), -1, dtype=torch.int32, device=rows.device)
        if count > 0:
            map_kernel[(triton.cdiv(count, 256),)](
                index, at, maps, count, length, batch, *each, slots, BLOCK=256, num_warps=4
            )
        if accumulate:
            sum_kernel[(length if reduce else slots,)](
                rows, index, maps, out, count, length, width, row_each, slots,
                batch if reduce else 1, *strides, ROUND=rounds_by_hand(rows), UNIT=unit,
                **_columns(dim),
            )  # fmt: skip
        else:
            scatter_kernel[(slots,)](
                rows, maps, out, width, row_each, fill, *strides, UNIT=unit, **_columns(dim)
            )
    return out


def _loss_arguments(
    pred: Tensor, teacher: Tensor, index: Tensor, offsets: Tensor | None
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(offsets, batch and strides, constants) of the loss kernels."""
    dim = teacher.shape[2]
    if dim > LONGEST_ROW:
        raise RuntimeError(f"backend='triton': got D = {dim}, takes at most {LONGEST_ROW}")
    at, each = _samples(index, offsets, teacher.shape[0])
    pred_each, *place = _place(pred)
    unit, width, strides = _in_units(dim, (pred, place), (teacher, teacher.stride()))
    sizes = teacher.shape[1], width, teacher.shape[0], *each, pred_each
    return at, (*sizes, *strides), {"UNIT": unit, **_columns(dim, LONGEST_ROW)}


def _terms(index: Tensor, teacher: Tensor, kind: int) -> int:
    return index.numel() * (1 if contract.KINDS[kind] == "cosine" else teacher.shape[2])


def loss_forward(
    pred: Tensor,
    teacher: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    kind: int,
    normalize: bool,
    beta: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    rows = index.numel()
    at, where, constants = _loss_arguments(pred, teacher, index, offsets)
    saved = pred.new_empty((rows, contract.saved_floats(kind)), dtype=torch.float32)
    loss = pred.new_empty((), dtype=torch.float32)
    programs = min(rows, 8 * device_of(pred).processors)
    partials = pred.new_empty(programs, dtype=torch.float64)
    with on_device(pred):
        loss_kernel[(programs,)](
            pred, teacher, index, at, saved, partials, rows, *where,
            beta, 1.0 / beta if beta > 0 else 0.0, eps,
            KIND=kind, NORMALIZE=normalize, **constants,
        )  # fmt: skip
        finish_kernel[(1,)](
            partials, loss, programs, 1.0 / _terms(index, teacher, kind), BLOCK=1024, num_warps=4
        )
    return loss, saved


def loss_backward(
    grad: Tensor,
    pred: Tensor,
    teacher: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    saved: Tensor,
    kind: int,
    normalize: bool,
    beta: float,
) -> Tensor:
    at, where, constants = _loss_arguments(pred, teacher, index, offsets)
    out = pred.new_empty(pred.shape)
    with on_device(pred):
        gradient_kernel[(index.numel(),)](
            grad, pred, teacher, index, at, saved, out, *where,
            beta, 1.0 / beta if beta > 0 else 0.0, 1.0 / _terms(index, teacher, kind),
            KIND=kind, ROUND=rounds_by_hand(pred), **constants,
        )  # fmt: skip
    return out


def order(
    context_index: Tensor,
    target_index: Tensor,
    context_offsets: Tensor | None,
    target_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    packed = context_offsets is not None
    if context_offsets is not None:
        sequences = contexts = context_offsets.shape[0] - 1
        kept = wanted = 0
        total = context_index.numel() + target_index.numel()
        index, context_rows = context_index.new_empty(total), torch.empty_like(context_index)
    else:
        (contexts, kept), (sequences, wanted) = context_index.shape, target_index.shape
        total = sequences * (kept + wanted)
        index = context_index.new_empty((sequences, kept + wanted))
        context_rows = context_index.new_empty((sequences, kept))
    target_rows = torch.empty_like(target_index)
    block = 64
    blocks = triton.cdiv(total, sequences * block)
    if total > 0:
        with on_device(index):
            order_kernel[(sequences * blocks,)](
                context_index, target_index,
                context_offsets if packed else context_index,
                target_offsets if packed else target_index,
                index, context_rows, target_rows, kept, wanted, contexts, blocks,
                PACKED=packed, BLOCK=block, CHUNK=64, num_warps=4,
            )  # fmt: skip
    return index, context_rows, target_rows


def assemble(
    context: Tensor,
    context_index: Tensor,
    context_rows: Tensor,
    target: Tensor,
    target_index: Tensor,
    target_rows: Tensor,
    positions: Tensor | None,
) -> Tensor:
    contexts, kept, dim = context.shape
    sequences, wanted = target_index.shape
    out = context.new_empty((sequences, kept + wanted, dim))
    if out.numel() == 0:
        return out
    place = (0, 0, 1) if target.dim() == 1 else target.stride()
    unit, width, strides = _in_units(dim, (context, context.stride()), (target, place))
    with on_device(context):
        assemble_kernel[(sequences * (kept + wanted),)](
            context, context_index, context_rows, target, target_index, target_rows,
            target if positions is None else positions, out, kept, wanted, contexts, width,
            0 if positions is None else positions.shape[0], *strides,
            TABLE=positions is not None, ROUND=rounds_by_hand(context), UNIT=unit, **_columns(dim),
        )  # fmt: skip
    return out


def column_sum(sequence: Tensor, rows: Tensor) -> Tensor:
    dim, count = sequence.shape[2], rows.numel()
    columns = 256
    tiles = triton.cdiv(dim, columns)
    processors = device_of(sequence).processors
    wanted = max(1, min(2 * processors // tiles, count // 64))
    block_rows = max(1, triton.cdiv(count, wanted))
    blocks = triton.cdiv(count, block_rows)
    out = sequence.new_empty(dim, dtype=torch.float32)
    partials = sequence.new_empty((max(1, blocks), dim), dtype=torch.float32)
    unit, width, strides = _in_units(dim, (sequence, sequence.stride()))
    with on_device(sequence):
        if blocks > 0:
            column_kernel[(tiles * blocks,)](
                sequence, rows, partials, sequence.shape[1], width, count, rows.shape[1], tiles,
                block_rows, *strides, UNIT=unit, ROWS=8, COLUMNS=columns, num_warps=8,
            )  # fmt: skip
        column_finish_kernel[(triton.cdiv(dim, 128),)](
            partials, out, blocks, dim, COLUMNS=128, num_warps=4
        )
    return out
