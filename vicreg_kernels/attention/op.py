"""Schema, fake, backends, autograd, and the public functions of masked attention and rotation.

One forward op and one backward op serve dense, packed and nested tensors: packed ones are a batch
of one with offsets. Rules travel as integers (masks.py), rotary position as a table and an index
(rope.py). Saved for the backward: the inputs, the output and a float32 a query and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import dispatch, library, reals
from vicreg_kernels.attention import backends, masks, reference
from vicreg_kernels.attention.masks import MaskArguments, Ragged, Rule, Rules
from vicreg_kernels.attention.rope import NO_ROPE, Rope3d, RopeArguments

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_RULES = (
    "Tensor? q_offsets, Tensor? k_offsets, Tensor? lengths, Tensor? keep, Tensor? bounds, "
    "SymInt max_q, SymInt max_k, int tokens_per_frame, int window, "
    "Tensor? table, Tensor? q_index, Tensor? k_index, int[] grid"
)
_LIBRARY.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_RULES}, float scale, str backend)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_RULES}, bool need_q, bool need_k, bool need_v, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_rotate(Tensor x, Tensor table, Tensor? index, Tensor? offsets, int[] grid, "
    "bool adjoint, str backend) -> Tensor"
)


@torch.library.impl(_LIBRARY, "attention_forward", "CompositeExplicitAutograd")
def _forward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return backends.load(args[-1]).forward(q, *args[:-1])


@torch.library.impl(_LIBRARY, "attention_backward", "CompositeExplicitAutograd")
def _backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backends.load(args[-1]).backward(grad, *args[:-1])


@torch.library.impl(_LIBRARY, "attention_rotate", "CompositeExplicitAutograd")
def _rotate(x: Tensor, *args: Any) -> Tensor:
    return backends.load(args[-1]).rotate(x, *args[:-1])


@torch.library.register_fake("vicreg_kernels::attention_forward")
def _forward_fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return backends.empty_like_heads(q), lse


@torch.library.register_fake("vicreg_kernels::attention_backward")
def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    needs = args[-5:-2]
    return tuple(
        backends.empty_like_heads(x) if need else x.new_empty((0,))
        for x, need in zip((q, k, v), needs, strict=True)
    )


@torch.library.register_fake("vicreg_kernels::attention_rotate")
def _rotate_fake(x: Tensor, *args: Any) -> Tensor:
    return backends.empty_like_heads(x)


class _Attention(torch.autograd.Function):
    """Backward is one op call. Once differentiable.

    packed: q, k and v are [total, H, d]. They are viewed as the op's [1, H, total, d] here, where
    autograd records nothing: recorded, the eight views and their gradients cost 55 us a step.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: bool, arguments: tuple[Any, ...]
    ) -> Tensor:
        heads = (_as_heads(q), _as_heads(k), _as_heads(v)) if packed else (q, k, v)
        if backends.direct(q, k, v):
            out, lse = backends.load(arguments[-1]).forward(*heads, *arguments[:-1])
        else:
            out, lse = torch.ops.vicreg_kernels.attention_forward(*heads, *arguments)
        if packed:
            out = _as_packed(out)
            if not torch.compiler.is_compiling():
                out = out.data  # no view for autograd, which refuses in-place changes of those
        # all tensors, so that autograd notices one that is changed before the backward
        tensors = arguments[:5] + arguments[9:12]
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.packed, ctx.numbers = packed, (arguments[5:9], arguments[12:])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needs = ctx.needs_input_grad[:3]
        run: Any = _AttentionGradient.apply if torch.is_grad_enabled() else _attention_gradient
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        numbers, rest = ctx.numbers
        arguments = (*tensors[:5], *numbers, *tensors[5:], *rest)
        dq, dk, dv = run(grad, q, k, v, out, lse, needs, ctx.packed, arguments)
        return dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None, *_NONE


_NONE = (None, None)


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


def _attention_gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    packed: bool,
    arguments: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    *rest, scale, backend = arguments
    direct = backends.direct(grad, q, k, v)
    if packed:
        grad, q, k, v, out = (_as_heads(x) for x in (grad, q, k, v, out))
    if direct:
        found = backends.load(backend).backward(grad, q, k, v, out, lse, *rest, *needs, scale)
    else:
        found = torch.ops.vicreg_kernels.attention_backward(
            grad, q, k, v, out, lse, *rest, *needs, scale, backend
        )
    if not packed:
        return found
    dq, dk, dv = (_as_packed(x) if need else x for x, need in zip(found, needs, strict=True))
    return dq, dk, dv


class _AttentionGradient(torch.autograd.Function):
    """The backward op under create_graph=True: a second derivative is an error, not a silent 0."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _attention_gradient(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "the fused attention differentiates once; backend='reference' to any order"
        )


class _Rotation(torch.autograd.Function):
    """Linear in x: the gradient is the adjoint rotation, to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, adjoint: bool, arguments: tuple[Any, ...]) -> Tensor:
        table, index, offsets, grid, backend = arguments
        ctx.save_for_backward(table, index, offsets)
        ctx.adjoint, ctx.settings = adjoint, (grid, backend)
        return torch.ops.vicreg_kernels.attention_rotate(
            x, table, index, offsets, grid, adjoint, backend
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        arguments = (*ctx.saved_tensors, *ctx.settings)
        return _Rotation.apply(grad, not ctx.adjoint, arguments), None, None


def takes_head_dim(dim: int) -> bool:
    return dim % 8 == 0 and 16 <= dim <= 128


def _check_heads(name: str, x: Tensor, like: Tensor | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, takes a torch.Tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {x.dtype}, takes float32, bfloat16, float16 or float64")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: got layout {x.layout}, takes a dense (strided) or jagged tensor")
    if x.dim() not in (3, 4):
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, takes [B, H, T, d] or packed [total, H, d]"
        )
    if not takes_head_dim(int(x.shape[-1])):  # int: one compiled graph a head dim
        raise ValueError(
            f"{name}: got head dim {x.shape[-1]}, takes a multiple of 8 from 16 to 128"
        )
    # Packed samples may hold no token, a batch must; heads there are in both.
    if 0 in x.shape[:-1] and (x.dim() == 4 or x.shape[1] == 0):
        raise ValueError(f"{name}: got no elements (shape {tuple(x.shape)})")
    if like is not None:
        if x.dtype != like.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, takes q's dtype {like.dtype}")
        if x.device != like.device:
            raise ValueError(f"{name}: got device {x.device}, takes q's device {like.device}")
        if x.dim() != like.dim() or x.shape[-1] != like.shape[-1]:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, takes q's dimensions and head dim "
                f"{tuple(like.shape)}"
            )


def _autocast(device_type: str) -> bool:
    available = torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def _usual(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v pass everything that _check_three looks at and autocast changes nothing.

    It takes 3 us where the checks one by one take 8; where the answer is no, they say why. Nothing
    is remembered from call to call.
    """
    if torch.compiler.is_compiling() or not backends.are_plain(q, k, v):
        return False
    if q.is_nested or k.is_nested or v.is_nested:
        return False
    dtype, device, shape, keys = q.dtype, q.device, q.shape, k.shape
    if not (k.dtype is dtype and v.dtype is dtype and dtype in DTYPES):
        return False
    if not (q.layout is k.layout is v.layout is torch.strided):
        return False
    if not (k.device == device and v.device == device and v.shape == keys):
        return False
    dims = len(shape)
    if dims == 4:
        if shape[0] != keys[0] or shape[0] * shape[1] * shape[2] * keys[2] == 0:
            return False
    elif dims != 3 or shape[1] == 0:
        return False
    if len(keys) != dims or shape[1] != keys[1] or shape[-1] != keys[-1]:
        return False
    if not takes_head_dim(shape[-1]):
        return False
    if not _autocast(device.type):
        return True
    return dtype is torch.float64 or dtype is torch.get_autocast_dtype(device.type)


def _check_three(q: Tensor, k: Tensor, v: Tensor) -> None:
    _check_heads("q", q)
    _check_heads("k", k, q)
    _check_heads("v", v, q)
    if k.shape[1] != q.shape[1] or (q.dim() == 4 and k.shape[0] != q.shape[0]):
        raise ValueError(f"k: got shape {tuple(k.shape)}, takes q's batch and heads")
    if v.shape != k.shape:
        raise ValueError(f"v: got shape {tuple(v.shape)}, takes k's shape {tuple(k.shape)}")


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    return float(reals.finite("scale", scale, None, " or None"))


def _is_ragged(mask: Any) -> bool:
    parts = mask.rules if isinstance(mask, Rules) else [mask]
    return any(isinstance(part, Ragged) for part in parts)


def _nested(q: Tensor, k: Tensor, v: Tensor, mask: Rule | None, settings: dict[str, Any]) -> Tensor:
    """Jagged nested tensors, [B, H, j, d] or [B, j, H, d], as packed tokens and back."""
    axes = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_nested or x.layout != torch.jagged:
            raise TypeError(f"{name}: got no jagged nested tensor, takes one where q, k or v is")
        if x.dim() != 4 or x._ragged_idx not in (1, 2):
            raise ValueError(
                f"{name}: got {x.dim()} dimensions, takes [B, H, j, d] or [B, j, H, d]"
            )
        if x._lengths is not None:
            raise ValueError(f"{name}: got a jagged tensor with holes, takes one made of offsets")
        axes.append(x._ragged_idx)
    if _is_ragged(mask):
        raise ValueError("mask: got Ragged with nested tensors, takes their own offsets")
    if not torch.equal(k.offsets(), v.offsets()):
        raise ValueError("v: got other lengths than k's, takes the same")
    packed = [
        x.values() if axis == 1 else x.values().transpose(0, 1)
        for x, axis in zip((q, k, v), axes, strict=True)
    ]
    same = q.offsets() is k.offsets()
    ragged: Rule = Ragged(
        q.offsets(),
        None if same else k.offsets(),
        max_length=q._get_max_seqlen(),
        max_key_length=None if same else k._get_max_seqlen(),
    )
    out = masked_attention(*packed, mask=ragged if mask is None else ragged & mask, **settings)
    if axes[0] == 1:
        return torch.nested.nested_tensor_from_jagged(out, q.offsets())
    return torch.nested.nested_tensor_from_jagged(out, q.offsets()).transpose(1, 2)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Rule | Tensor | None = None,
    rope: Rope3d | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale q kᵀ) v over the keys that each query sees, without any T x T tensor.

    Args:
        q: queries, [B, H, Tq, d], or packed [total, H, d] with a `Ragged` rule; float32, bfloat16,
            float16 or float64, any strides. Head dims: multiples of 8 from 16 to 128. Jagged
            nested tensors, [B, H, j, d] or [B, j, H, d], bring their own offsets.
        k, v: keys and values, [B, H, Tk, d] or packed; q's dtype, device, heads and head dim.
        mask: a rule, several joined by `&`, or a boolean [B, Tk], True for a key that is seen:
            `KeyPadding`, `Ragged`, `FrameCausal`, `Blocks`. None: every key is seen.
        rope: rotary position for q and k, applied inside; see `Rope3d`.
        scale: of the scores; None: d^-1/2.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the input.

    Returns:
        q's shape and dtype. It lies as [B, T, H, d] in memory, so that merging the heads is a view.
        A query that sees no key gives zeros, and zero gradients. Under autocast inputs are cast as
        those of torch's scaled_dot_product_attention. Fused backends differentiate once,
        "reference" to any order. Source of the formula: Vaswani et al., 2017 (arXiv:1706.03762).

    Raises:
        ValueError, TypeError: a shape, dtype, device, rule or setting is not one of the above; the
            message names the argument.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    if not _usual(q, k, v):
        if any(isinstance(x, Tensor) and x.is_nested for x in (q, k, v)):
            settings = {"rope": rope, "scale": scale, "backend": backend}
            return _nested(q, k, v, mask, settings)
        if isinstance(q, Tensor) and _autocast(q.device.type):
            lower = torch.get_autocast_dtype(q.device.type)
            q, k, v = (x.to(lower) if x.dtype in DTYPES[1:] else x for x in (q, k, v))
        _check_three(q, k, v)
    if rope is not None and not isinstance(rope, Rope3d):
        raise TypeError(f"rope: got {type(rope).__name__}, takes a Rope3d or None")
    factor = _scale(scale, int(q.shape[-1]))
    packed = q.dim() == 3
    if packed != (mask is not None and _is_ragged(mask)):
        takes = "packed tokens [total, H, d]" if _is_ragged(mask) else "a Ragged rule"
        raise ValueError(f"{'mask' if packed else 'q'}: got shape {tuple(q.shape)}, takes {takes}")
    rules = masks.resolve(mask, q, k)
    turned = NO_ROPE if rope is None else rope.resolve(q, k, (rules.max_q, rules.max_k))
    return _attend(q, k, v, rules, rope, turned, factor, backend)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: MaskArguments,
    rope: Rope3d | None,
    turned: RopeArguments,
    scale: float,
    backend: str | None,
) -> Tensor:
    packed = q.dim() == 3
    unfit = backends.unfit(q.dtype, max(rules.max_q, rules.max_k))
    name = dispatch.choose("attention", backend, q.device.type, q.dtype, unfit=unfit)
    if not torch.compiler.is_compiling():
        dispatch.log_choice("attention", name, backend, q.device, q.shape)
    if name == "reference":
        if packed:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = reference.attention(q, k, v, rules, rope, turned[1:3], scale)
        return out.squeeze(0).transpose(0, 1) if packed else out
    return _Attention.apply(q, k, v, packed, (*rules, *turned, scale, name))


def apply_rope(
    x: Tensor, rope: Rope3d, *, offsets: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Rotary position alone: x turned by each token's place in the grid, rope.index.

    Args:
        x: [B, H, T, d], or packed [total, H, d]; dtypes, strides and head dims as in
            `masked_attention`. Angles are float32 whatever x is.
        rope: the grid, the index and the order of the frequencies.
        offsets: int [B + 1] of packed samples, where rope.index is None and a token's place is
            counted from its sample's first.
        backend: as in `masked_attention`.

    Returns: x's shape and dtype, lying as [B, T, H, d]. Raises: as `masked_attention`.
    """
    _check_heads("x", x)
    if not isinstance(rope, Rope3d):
        raise TypeError(f"rope: got {type(rope).__name__}, takes a Rope3d")
    if x.dim() == 3:
        return apply_rope_packed(x, rope, offsets, backend)
    if offsets is not None:
        raise ValueError(f"offsets: got offsets with shape {tuple(x.shape)}, takes packed tokens")
    return _turn(x, rope, None, x.shape[2], backend)


def apply_rope_packed(
    x: Tensor, rope: Rope3d, offsets: Tensor | None, backend: str | None
) -> Tensor:
    """x: packed [total, H, d]."""
    longest = x.shape[0]
    if offsets is not None:
        ragged = Ragged(offsets)
        if ragged.total is not None and ragged.total != x.shape[0]:
            raise ValueError(f"offsets: got offsets up to {ragged.total}, takes {x.shape[0]}")
        longest = ragged.max_length
        offsets = ragged.tensors.on("offsets", x.device)
    out = _turn(x.transpose(0, 1).unsqueeze(0), rope, offsets, longest, backend)
    return out.squeeze(0).transpose(0, 1)


def _turn(
    x: Tensor, rope: Rope3d, offsets: Tensor | None, longest: int, backend: str | None
) -> Tensor:
    table, index, _, grid = rope.resolve(x, x, (longest, longest))
    name = dispatch.choose("rope", backend, x.device.type, x.dtype)
    if not torch.compiler.is_compiling():
        dispatch.log_choice("rope", name, backend, x.device, x.shape)
    if name == "reference":
        with library.no_autocast(x.device):
            wide = x if x.dtype == torch.float64 else x.float()
            return reference.rotate(wide, rope, index, offsets).to(x.dtype)
    return _Rotation.apply(x, False, (table, index, offsets, grid, name))
