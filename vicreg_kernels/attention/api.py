"""The public functions of masked attention and rotation, and their checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vicreg_kernels.attention import contract, masks, reference
from vicreg_kernels.attention.contract import Settings
from vicreg_kernels.attention.masks import MaskArguments, Ragged, Rule, Rules
from vicreg_kernels.attention.op import Attention, Rotation
from vicreg_kernels.attention.rope import NO_ROPE, Rope3d, RopeArguments
from vicreg_kernels.core import checks, dispatch, library, reals
from vicreg_kernels.core.checks import DTYPES


def takes_head_dim(dim: int) -> bool:
    return dim % 8 == 0 and 16 <= dim <= 128


def _check_heads(name: str, x: Tensor, like: Tensor | None = None) -> None:
    checks.is_tensor(name, x)
    checks.dense_float(name, x.dtype, x.layout, "dense (strided) or jagged")
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
        checks.same_dtype(name, x.dtype, like.dtype, "q's dtype")
        checks.same_device(name, x.device, like.device, "q's device")
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
    if torch.compiler.is_compiling() or not contract.are_plain(q, k, v):
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
    """Compute softmax(scale q kᵀ) v over the keys that each query sees, without a T x T tensor.

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
    cannot_run = contract.cannot_run(q.dtype, max(rules.max_q, rules.max_k))
    name = dispatch.choose("attention", backend, q.device.type, q.dtype, cannot_run=cannot_run)
    if not torch.compiler.is_compiling():
        dispatch.log_choice("attention", name, backend, q.device, q.shape)
    if name == "reference":
        if packed:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        index = (turned.q_index, turned.k_index)
        out = reference.attention(q, k, v, rules, rope, index, scale)
        return out.squeeze(0).transpose(0, 1) if packed else out
    return Attention.apply(q, k, v, packed, name, Settings(rules, turned, scale))


def apply_rope(
    x: Tensor, rope: Rope3d, *, offsets: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Apply rotary position only: rotate x by each token's place in the grid, rope.index.

    Args:
        x: [B, H, T, d], or packed [total, H, d]; dtypes, strides and head dims as in
            `masked_attention`. Angles are float32 whatever x is.
        rope: the grid, the index and the order of the frequencies.
        offsets: int [B + 1], for packed samples if rope.index is None: a token's place is then
            counted from the first token of its sample.
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
    turned = rope.resolve(x, x, (longest, longest))
    index = turned.q_index
    name = dispatch.choose("rope", backend, x.device.type, x.dtype)
    if not torch.compiler.is_compiling():
        dispatch.log_choice("rope", name, backend, x.device, x.shape)
    if name == "reference":
        with library.no_autocast(x.device):
            wide = x if x.dtype == torch.float64 else x.float()
            return reference.rotate(wide, rope, index, offsets).to(x.dtype)
    return Rotation.apply(x, turned.table, index, offsets, turned.grid, False, name)
