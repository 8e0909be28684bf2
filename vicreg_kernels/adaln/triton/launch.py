"""Launchers of adaptive layer norm's Triton kernels; `contract.py` says what each takes and gives.

Launches: forward one each; backward one, and one for each vector's gradient where several programs
share a frame. Nothing waits for the device, and allocation depends on shapes alone, so all can be
captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vicreg_kernels.adaln.contract import LONGEST
from vicreg_kernels.adaln.triton.gate import gate_gradient_kernel, gate_kernel
from vicreg_kernels.adaln.triton.norm import (
    norm_gradient_kernel,
    norm_kernel,
    vectors_finish_kernel,
)
from vicreg_kernels.core.triton.device import device_of, on_device, rounds_by_hand
from vicreg_kernels.core.units import unit as unit_of

# Tiles of the gated residual.
ROWS, COLUMNS = 8, 256
# Tokens that a program of the backward takes at least, where its frame has as many.
LEAST_TOKENS = 16


class Cut(NamedTuple):
    """How many programs share a frame (of frames of one token: all frames), of how many tokens."""

    parts: int
    part_tokens: int
    programs: int


def _cut(z: Tensor, wanted: int) -> Cut:
    frames, tokens, _ = z.shape
    length, count = (frames, 1) if tokens == 1 else (tokens, frames)
    parts = max(1, min(triton.cdiv(wanted, count), triton.cdiv(length, LEAST_TOKENS)))
    each = triton.cdiv(length, parts)
    return Cut(triton.cdiv(length, each), each, count * triton.cdiv(length, each))


def _columns(dim: int) -> dict[str, int]:
    """A block of all columns, and warps for 8 elements a thread."""
    if dim > LONGEST:
        raise RuntimeError(f"backend='triton': got D = {dim}, takes at most {LONGEST}")
    block = max(256, triton.next_power_of_2(dim))
    return {"BLOCK": block, "num_warps": min(16, block // 256)}


def _in_units(*tensors: Tensor) -> tuple[int, int, list[int]]:
    """(unit, dim in it, the tensors' strides in it but for those of columns)."""
    smaller = min(tensors, key=Tensor.element_size)
    dim = smaller.shape[-1]
    wide = [stride for z in tensors for stride in z.stride()[:-1]]
    unit = unit_of(smaller, (dim, *wide), [z.stride(-1) for z in tensors], tensors)
    strides = [s for z in tensors for s in (*(n // unit for n in z.stride()[:-1]), z.stride(-1))]
    return unit, dim // unit, strides


def _like(z: Tensor, needed: bool = True) -> Tensor:
    return z.new_empty(z.shape if needed else (0,))


def _sums(out: Tensor, cut: Cut, tokens: int) -> Tensor:
    """Where programs write a vector's gradient: `out` itself, or a row for each program."""
    if out.numel() == 0 or tokens == 1 or cut.parts == 1:
        return out
    return out.new_empty((cut.programs, out.shape[1]), dtype=torch.float32)


def _finish(sums: Tensor, cut: Cut, out: Tensor) -> None:
    if sums is not out:
        vectors_finish_kernel[(triton.cdiv(out.numel(), 256),)](
            sums, out, out.numel(), out.shape[1], cut.parts,
            ROUND=rounds_by_hand(out), BLOCK=256, num_warps=4,
        )  # fmt: skip


def norm_forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    frames, tokens, dim = x.shape
    constants = _columns(dim)
    out, saved = _like(x), x.new_empty((frames, tokens, 2), dtype=torch.float32)
    unit, width, strides = _in_units(x, shift, scale)
    with on_device(x):
        norm_kernel[(frames * tokens,)](
            x, shift, scale, out, saved, tokens, width, *strides, eps,
            UNIT=unit, ROUND=rounds_by_hand(x), **constants,
        )  # fmt: skip
    return out, saved


def norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, saved: Tensor, need_x: bool, need_vectors: bool
) -> tuple[Tensor, Tensor, Tensor]:
    frames, tokens, dim = x.shape
    constants, cut = _columns(dim), _cut(x, 16 * device_of(x).processors)
    grad_x = _like(x, need_x)
    gradients = [_like(scale, need_vectors) for _ in range(2)]
    sums = [_sums(z, cut, tokens) for z in gradients]
    unit, width, strides = _in_units(grad, x, scale)
    with on_device(x):
        norm_gradient_kernel[(cut.programs,)](
            grad, x, scale, saved, grad_x, *sums, frames, tokens, width,
            cut.parts, cut.part_tokens, *strides, FRAMES=tokens > 1, NEED_X=need_x,
            NEED_VECTORS=need_vectors, UNIT=unit, ROUND=rounds_by_hand(x),
            ROUND_VECTORS=rounds_by_hand(sums[0]), **constants,
        )  # fmt: skip
        for own, out in zip(sums, gradients, strict=True):
            _finish(own, cut, out)
    return grad_x, gradients[0], gradients[1]


def gate_forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    frames, tokens, dim = x.shape
    out, tiles = _like(x), triton.cdiv(dim, COLUMNS)
    unit, width, strides = _in_units(x, y, gate)
    with on_device(x):
        gate_kernel[(triton.cdiv(frames * tokens, ROWS) * tiles,)](
            x, y, gate, out, frames, tokens, width, tiles, *strides,
            UNIT=unit, ROUND=rounds_by_hand(x), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8,
        )  # fmt: skip
    return out


def gate_backward(
    grad: Tensor, y: Tensor, gate: Tensor, need_y: bool, need_gate: bool
) -> tuple[Tensor, Tensor]:
    frames, tokens, dim = y.shape
    tiles = triton.cdiv(dim, COLUMNS)
    cut = _cut(y, triton.cdiv(8 * device_of(y).processors, tiles))
    grad_y, grad_gate = _like(y, need_y), _like(gate, need_gate)
    sums = _sums(grad_gate, cut, tokens)
    unit, width, strides = _in_units(grad, y, gate)
    with on_device(y):
        gate_gradient_kernel[(cut.programs * tiles,)](
            grad, y, gate, grad_y, sums, frames, tokens, width, tiles, cut.parts, cut.part_tokens,
            *strides, FRAMES=tokens > 1, NEED_Y=need_y, NEED_GATE=need_gate, UNIT=unit,
            ROUND=rounds_by_hand(y), ROUND_GATE=rounds_by_hand(sums), ROWS=ROWS, COLUMNS=COLUMNS,
            num_warps=8,
        )  # fmt: skip
        _finish(sums, cut, grad_gate)
    return grad_y, grad_gate
