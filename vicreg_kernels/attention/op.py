"""Schema, fake, backends and autograd of masked attention and rotation; api.py has the public
functions.

One forward op and one backward op serve dense, packed and nested tensors: packed ones are a batch
of one with offsets. Rules travel as integers (masks.py), rotary position as a table and an index
(rope.py). Saved for the backward: the inputs, the output and a float32 a query and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels.attention import contract
from vicreg_kernels.attention.contract import Kernels, Settings
from vicreg_kernels.attention.masks import MaskArguments
from vicreg_kernels.attention.rope import RopeArguments
from vicreg_kernels.core import loader, schema
from vicreg_kernels.core.once import once

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_SETTINGS = (
    f"str backend, {schema.arguments(MaskArguments, max_q='SymInt', max_k='SymInt')},"
    f" {schema.arguments(RopeArguments)}, float scale"
)
_LIBRARY.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" bool need_q, bool need_k, bool need_v, {_SETTINGS}) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_rotate(Tensor x, Tensor table, Tensor? index, Tensor? offsets, int[] grid, "
    "bool adjoint, str backend) -> Tensor"
)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, backend: str, settings: Settings
) -> tuple[Tensor, Tensor]:
    kernels = loader.load("attention", Kernels, backend)
    return kernels.forward(q, k, v, *settings.rules, *settings.rope, settings.scale)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    backend: str,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = loader.load("attention", Kernels, backend)
    rules, rope, scale = settings
    return kernels.backward(grad, q, k, v, out, lse, *rules, *rope, *needs, scale)


@torch.library.impl(_LIBRARY, "attention_forward", "CompositeExplicitAutograd")
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, backend: str, *settings: Any
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, backend, Settings.of(*settings))


@torch.library.impl(_LIBRARY, "attention_backward", "CompositeExplicitAutograd")
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    backend: str,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (need_q, need_k, need_v)
    return _backward(grad, q, k, v, out, lse, needs, backend, Settings.of(*settings))


@torch.library.impl(_LIBRARY, "attention_rotate", "CompositeExplicitAutograd")
def _rotate(
    x: Tensor,
    table: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    grid: list[int],
    adjoint: bool,
    backend: str,
) -> Tensor:
    kernels = loader.load("attention", Kernels, backend)
    return kernels.rotate(x, table, index, offsets, grid, adjoint)


@torch.library.register_fake("vicreg_kernels::attention_forward")
def _forward_fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return contract.empty_like_heads(q), lse


@torch.library.register_fake("vicreg_kernels::attention_backward")
def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    *settings: Any,
) -> tuple[Tensor, ...]:
    return tuple(
        contract.empty_like_heads(x) if need else x.new_empty((0,))
        for x, need in ((q, need_q), (k, need_k), (v, need_v))
    )


@torch.library.register_fake("vicreg_kernels::attention_rotate")
def _rotate_fake(x: Tensor, *args: Any) -> Tensor:
    return contract.empty_like_heads(x)


class Attention(torch.autograd.Function):
    """Backward is one op call. Once differentiable.

    packed: q, k and v are [total, H, d]. They are viewed as the op's [1, H, total, d] here, where
    autograd records nothing: recorded, the eight views and their gradients cost 55 us a step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed: bool,
        backend: str,
        settings: Settings,
    ) -> Tensor:
        heads = (_as_heads(q), _as_heads(k), _as_heads(v)) if packed else (q, k, v)
        if contract.direct(q, k, v):
            out, lse = _forward(*heads, backend, settings)
        else:
            rules, rope, scale = settings
            out, lse = torch.ops.vicreg_kernels.attention_forward(
                *heads, backend, *rules, *rope, scale
            )
        if packed:
            out = _as_packed(out)
            if not torch.compiler.is_compiling():
                out = out.data  # no view for autograd, which refuses in-place changes of those
        # all tensors, so that autograd notices one that is changed before the backward
        tensors, ctx.settings = settings.apart()
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.packed, ctx.backend = packed, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needs = ctx.needs_input_grad[:3]
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        settings = ctx.settings.together(*tensors)
        args = (grad, q, k, v, out, lse, needs, ctx.packed, ctx.backend, settings)
        dq, dk, dv = once("attention", _gradient, *args)
        grads = (dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None)
        return (*grads, None, None, None)


def _as_heads(x: Tensor) -> Tensor:
    """[total, H, d] as [1, H, total, d]; eagerly in one view, which costs half of two."""
    if torch.compiler.is_compiling():
        return x.unsqueeze(0).transpose(1, 2)
    (total, heads, dim), (t, h, d) = x.shape, x.stride()
    return x.as_strided((1, heads, total, dim), (total * t, h, t, d))


def _as_packed(x: Tensor) -> Tensor:
    """[1, H, total, d] as [total, H, d]."""
    if torch.compiler.is_compiling():
        return x.squeeze(0).transpose(0, 1)
    (_, heads, total, dim), (_, h, t, d) = x.shape, x.stride()
    return x.as_strided((total, heads, dim), (t, h, d))


def _gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    packed: bool,
    backend: str,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    direct = contract.direct(grad, q, k, v)
    if packed:
        grad, q, k, v, out = (_as_heads(x) for x in (grad, q, k, v, out))
    if direct:
        grads = _backward(grad, q, k, v, out, lse, needs, backend, settings)
    else:
        rules, rope, scale = settings
        grads = torch.ops.vicreg_kernels.attention_backward(
            grad, q, k, v, out, lse, *needs, backend, *rules, *rope, scale
        )
    if not packed:
        return grads
    dq, dk, dv = (_as_packed(x) if need else x for x, need in zip(grads, needs, strict=True))
    return dq, dk, dv


class Rotation(torch.autograd.Function):
    """Linear in x: the gradient is the adjoint rotation, to any order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: Tensor,
        index: Tensor | None,
        offsets: Tensor | None,
        grid: list[int],
        adjoint: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(table, index, offsets)
        ctx.grid, ctx.adjoint, ctx.backend = grid, adjoint, backend
        return torch.ops.vicreg_kernels.attention_rotate(
            x, table, index, offsets, grid, adjoint, backend
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        args = (grad, *ctx.saved_tensors, ctx.grid, not ctx.adjoint, ctx.backend)
        if torch.is_grad_enabled():
            return Rotation.apply(*args), *(None,) * 6
        rotate = torch.ops.vicreg_kernels.attention_rotate
        return once("rotary position", rotate, *args), *(None,) * 6
