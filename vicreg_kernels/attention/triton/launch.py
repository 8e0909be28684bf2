"""Launchers of the attention op's Triton kernels.

Launches: forward 1, backward 2; with rotary position forward one more on samples of more than two
tiles (keys turned to scratch), backward two more (queries and keys). Nothing waits for the device,
and allocation depends on shapes alone, so both can be captured in a CUDA graph: a ragged grid is as
large as it can need to be (rules.find_sample), not as the lengths say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vicreg_kernels.attention.contract import Settings, empty_like_heads
from vicreg_kernels.attention.triton import configs
from vicreg_kernels.attention.triton.backward import (
    delta_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from vicreg_kernels.attention.triton.forward import forward_kernel
from vicreg_kernels.attention.triton.rope import rotate_kernel
from vicreg_kernels.attention.triton.tiles import aligned, parts
from vicreg_kernels.core.triton.device import device_of, on_device, operand_format

LOG2_E = 1.4426950408889634
# Tokens and heads of a program of the rotation, and its warps: angles are looked up once for them.
ROTATION = (32, 4, 4)
# Rows of a program of delta_kernel.
DELTA_ROWS = 64


class LaunchPlan:
    """What the launches of one call need to know of its rules, positions and sizes."""

    def __init__(self, q: Tensor, k: Tensor, settings: Settings) -> None:
        self.rules, self.rope = rules, rope = settings.rules, settings.rope
        self.batch, self.heads, self.tokens, self.head_dim = q.shape
        self.keys = k.shape[2]
        # 0: the rows are the samples
        self.samples = 0 if rules.q_offsets is None else rules.q_offsets.shape[0] - 1
        self.format, self.precision, _ = operand_format(q)
        self.longest = (min(rules.max_q, self.tokens), min(rules.max_k, self.keys))
        name, _, major = device_of(q)
        self.config = configs.nearest(name, major, self.format, self.head_dim, max(self.longest))
        longest = max(self.tokens, self.keys, 1)
        # Values that make no difference are kept inside int32, whatever was asked for.
        frame = min(rules.tokens_per_frame, longest)
        frames = triton.cdiv(longest, max(frame, 1))
        self.frame = (frame, min(rules.window, frames) if rules.window > 0 else frames)
        self.axes = rope.grid[3]
        self.part = 0 if rope.table is None else rope.table.shape[1]
        self.grid = rope_grid(rope.grid)

    def tiles(self, side: str, size: int) -> int:
        """Programs a head of a batch row; "q" or "k"."""
        tokens = self.tokens if side == "q" else self.keys
        if self.rules.q_offsets is None:
            return triton.cdiv(tokens, size)
        return tokens // size + self.samples

    def tensors(self, lse: Tensor) -> tuple[Tensor, ...]:
        """lse: stands for what is not there, as a tensor of the same dtype: else kernels differ."""
        rules, rope = self.rules, self.rope
        none = lse.view(torch.int32)
        given = (rules.q_offsets, rules.k_offsets, rules.lengths, rules.keep, rules.bounds,
                 rope.table, rope.q_index, rope.k_index)  # fmt: skip
        q_offsets, k_offsets, lengths, keep, bounds, table, q_index, k_index = (
            none if t is None else t for t in given
        )
        return (
            q_offsets, k_offsets, lengths, keep.view(torch.int8), bounds,
            lse if rope.table is None else table, q_index, k_index,
        )  # fmt: skip

    def sizes(self, tiles: int) -> tuple[int, ...]:
        bounds = self.rules.bounds
        each = 0 if bounds is None or bounds.shape[0] == 1 else bounds.shape[1]
        blocks = 0 if bounds is None else bounds.shape[1] - 1
        return (
            self.samples, self.heads, self.tokens, self.keys, tiles, each, blocks, *self.frame,
            int(self.rules.lengths is not None),
            *indexing(self.rope.q_index), *indexing(self.rope.k_index), *self.grid,
            self.axes, self.part,
        )  # fmt: skip

    def flags(self) -> dict[str, Any]:
        rules = self.rules
        first, second = parts(self.head_dim, self.format)
        return {
            # The plain product spares the registers; under a rule they are not missed.
            "VARIED": rules.tokens_per_frame > 0
            or any(
                t is not None for t in (rules.q_offsets, rules.lengths, rules.keep, rules.bounds)
            ),
            "KEEP": rules.keep is not None, "FRAMES": rules.tokens_per_frame > 0,
            "BLOCKS": rules.bounds is not None, "TURNED": self.axes * self.part,
            "HEAD": self.head_dim, "D1": first, "D2": second,
            "FORMAT": self.format, "PRECISION": self.precision,
        }  # fmt: skip

    def turned(self, x: Tensor, side: str) -> Tensor:
        """x by rotary position, to scratch."""
        rules, rope = self.rules, self.rope
        assert rope.table is not None
        index = rope.q_index if side == "q" else rope.k_index
        offsets = rules.q_offsets if side == "q" else rules.k_offsets
        return rotate(x, rope.table, index, offsets, rope.grid, False)


def indexing(index: Tensor | None) -> tuple[int, int]:
    """(1 if there is an index [B or 1, T], elements between its batch rows)."""
    if index is None:
        return 0, 0
    return 1, 0 if index.shape[0] == 1 else index.shape[1]


def rope_grid(grid: Sequence[int]) -> tuple[int, int, int, int]:
    """The three sizes and the last place, as far as an int32 place reaches."""
    frames, height, width, _ = grid
    return frames, height, width, min(frames * height * width, 2**31) - 1


def forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """out, lse; see contract.py."""
    settings = Settings.of(*arguments)
    p, scale = LaunchPlan(q, k, settings), settings.scale
    out = empty_like_heads(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    queries, keys, warps, stages = p.config.forward
    tiles = p.tiles("q", queries)
    if out.numel() == 0:
        return out, lse
    turn_keys = p.axes > 0 and triton.cdiv(p.longest[0], queries) <= p.config.turned
    if p.axes and not turn_keys:
        k = p.turned(k, "k")
    with on_device(q):
        forward_kernel[(tiles * p.heads * p.batch,)](
            q, k, v, out, lse, *p.tensors(lse), *p.sizes(tiles),
            *q.stride(), *k.stride(), *v.stride(), abs(scale) * LOG2_E,
            **p.flags(), ALIGNED=aligned(q, k, v), TURN_KEYS=turn_keys,
            NEGATE=math.copysign(1.0, scale) < 0,
            QUERIES=queries, KEYS=keys, num_warps=warps,
            num_stages=1 if turn_keys else stages,  # else the table's rows are pipelined too
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, empty where not needed; see contract.py."""
    *rules_and_rope, need_q, need_k, need_v, scale = arguments
    p = LaunchPlan(q, k, Settings.of(*rules_and_rope, scale))
    dq, dk, dv = (
        empty_like_heads(x) if need else x.new_empty((0,))
        for x, need in ((q, need_q), (k, need_k), (v, need_v))
    )
    if not (need_q or need_k or need_v):
        return dq, dk, dv
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta, peak = (torch.empty_like(lse) for _ in range(2))
    turned_q, turned_k = (p.turned(q, "q"), p.turned(k, "k")) if p.axes else (q, k)
    strides = (*grad.stride(), *turned_q.stride(), *turned_k.stride(), *v.stride())
    whole = aligned(grad, turned_q, turned_k, v)
    operands = (grad, turned_q, turned_k, v, peak, delta)
    rows = p.batch * p.tokens * p.heads
    with on_device(q):
        if need_q:
            queries, keys, warps, stages = p.config.query_gradient
            tiles = p.tiles("q", queries)
            query_gradient_kernel[(tiles * p.heads * p.batch,)](
                *operands, out, lse, dq, *p.tensors(lse), *p.sizes(tiles), *strides, scale * LOG2_E,
                **p.flags(), ALIGNED=whole, QUERIES=queries, KEYS=keys,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
        else:
            delta_kernel[(triton.cdiv(rows, DELTA_ROWS),)](
                grad, out, lse, delta, peak, p.heads, p.tokens, rows, *grad.stride(),
                ALIGNED=aligned(grad), HEAD=p.head_dim, WIDTH=triton.next_power_of_2(p.head_dim),
                ROWS=DELTA_ROWS, num_warps=4,
            )  # fmt: skip
        # float32's split operands fill the registers: dv and dk one after the other
        single = p.format in ("fp32", "tf32")
        for k_now, v_now in ((False, need_v), (need_k, False)) if single else ((need_k, need_v),):
            if not (k_now or v_now):
                continue
            queries, keys, warps, stages = p.config.key_gradient
            tiles, flags = p.tiles("k", keys), p.flags()
            if not k_now:  # only dk is turned back
                flags["TURNED"] = 0
            key_gradient_kernel[(tiles * p.heads * p.batch,)](
                *operands, dk, dv, *p.tensors(lse), *p.sizes(tiles), *strides, scale * LOG2_E,
                **flags, ALIGNED=whole, NEED_K=k_now, NEED_V=v_now,
                QUERIES=queries, KEYS=keys, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return dq, dk, dv


def rotate(
    x: Tensor,
    table: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    grid: Sequence[int],
    adjoint: bool,
) -> Tensor:
    """x turned by each token's place, or by the adjoint; see contract.py."""
    out = empty_like_heads(x)
    if out.numel() == 0:
        return out
    batch, heads, tokens, head_dim = x.shape
    operands, *_ = operand_format(x)
    rows, each, warps = ROTATION
    ragged = index is None and offsets is not None
    samples = offsets.shape[0] - 1 if ragged and offsets is not None else 0
    none = table.view(torch.int32)
    tiles = tokens // rows + samples if ragged else triton.cdiv(tokens, rows)
    first, second = parts(head_dim)
    part = table.shape[1]
    with on_device(x):
        rotate_kernel[(triton.cdiv(heads, each) * tiles * batch,)](
            x, out, table, none if index is None else index, offsets if ragged else none,
            samples, heads, tokens, tiles, *indexing(index), *rope_grid(grid), grid[3], part,
            int(adjoint), *x.stride(), ALIGNED=aligned(x), TURNED=grid[3] * part,
            FORMAT=operands,
            HEAD=head_dim, D1=first, D2=second, TOKENS=rows, HEADS=each, num_warps=warps,
        )  # fmt: skip
    return out
