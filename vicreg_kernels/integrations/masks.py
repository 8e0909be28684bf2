"""Attention with the masks of other people's frameworks, read as this library's rules."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels.attention import FrameCausal, KeyPadding, Rope3d, masked_attention
from vicreg_kernels.attention.masks import Rule

# What an additive mask hides with: float16's least number or below, down to -inf.
HIDDEN = float(torch.finfo(torch.float16).min)
_TAKES = (
    "takes one that says which keys are padding, for all heads or each, with a causal order or "
    "without; the model's own attention takes any"
)


class Said(NamedTuple):
    """What a mask says. by_head: rule is KeyPadding of [B H, Tk], samples and heads together."""

    rule: Rule | None
    by_head: bool


class _Kept(NamedTuple):
    """What a mask said when it had this version, for these sizes."""

    mask: weakref.ref[Tensor]
    key: tuple[Any, ...]
    said: Said


# By the mask's id, which another tensor has once it is gone: the reference tells them apart. A
# table of its own, since what a tensor's __dict__ holds goes along into its copies.
_kept: dict[int, _Kept] = {}


def _forget(place: int) -> Callable[[weakref.ref[Tensor]], None]:
    def gone(mask: weakref.ref[Tensor]) -> None:
        kept = _kept.get(place)
        if kept is not None and kept.mask is mask:
            del _kept[place]

    return gone


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    rope: Rope3d | None = None,
    scale: float | None = None,
    name: str = "attn_mask",
    frame: int = 1,
    backend: str | None = None,
) -> Tensor:
    """`masked_attention` of [B, H, T, d] each under a mask tensor -> [B, H, Tq, d].

    mask: as `read` takes it, called `name` in errors, of up to four dimensions. None: every key is
    seen, or where `causal`, the first to the query's own.
    """
    (samples, heads, queries, _), keys = query.shape, key.shape[2]
    settings: dict[str, Any] = {"rope": rope, "scale": scale, "backend": backend}
    if mask is None:
        rule = FrameCausal(1) if causal else None
        return masked_attention(query, key, value, mask=rule, **settings)
    said = read(mask, samples, heads, queries, keys, name=name, frame=frame)
    if not said.by_head:
        return masked_attention(query, key, value, mask=said.rule, **settings)
    if rope is not None:
        raise ValueError(f"{name}: got one that differs by head, with rotation")
    query, key, value = (x.flatten(0, 1).unsqueeze(1) for x in (query, key, value))
    out = masked_attention(query, key, value, mask=said.rule, **settings)
    return out.reshape(samples, heads, queries, -1)


def read(
    mask: Tensor,
    samples: int,
    heads: int,
    queries: int,
    keys: int,
    *,
    name: str = "attention_mask",
    frame: int = 1,
) -> Said:
    """The rule of a mask that broadcasts to [samples, heads, queries, keys], boolean (True: seen)
    or additive (0, or -65504 and below).

    What a mask says is read once and kept as long as it lives, since on a device that waits for it.
    frame: tokens of a frame, where the causal order may be that of frames.

    Raises a ValueError where it says anything else.
    """
    shape = (samples, heads, queries, keys)
    ends = shape[4 - mask.dim() :]
    if mask.dim() > 4 or any(n not in (1, m) for n, m in zip(mask.shape, ends, strict=True)):
        raise ValueError(
            f"{name}: got shape {tuple(mask.shape)}, takes one that broadcasts to {shape}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: got dtype {mask.dtype}, takes bool or floating point")
    whole = mask[(None,) * (4 - mask.dim())]
    if torch.compiler.is_compiling():
        return _of_keys(_unread(whole, name), shape, whole.shape[1] > 1, None)
    if mask.is_inference():
        return _read(whole, shape, name, frame)
    key, kept = (mask._version, shape, frame), _kept.get(id(mask))
    if kept is not None and kept.mask() is mask and kept.key == key:
        return kept.said
    said = _read(whole, shape, name, frame)
    _kept[id(mask)] = _Kept(weakref.ref(mask, _forget(id(mask))), key, said)
    return said


def _unread(mask: Tensor, name: str) -> Tensor:
    """bool [B, heads, Tk] of a mask whose values cannot be looked at."""
    if mask.dtype != torch.bool or mask.shape[2] != 1:
        raise ValueError(
            f"{name}: got {mask.dtype} {tuple(mask.shape)} inside torch.compile, takes "
            "bool [B, 1, 1, Tk] there, whose meaning does not depend on its values"
        )
    return mask[:, :, 0]


def _read(mask: Tensor, shape: tuple[int, ...], name: str, frame: int) -> Said:
    seen = mask if mask.dtype == torch.bool else mask == 0
    seen = _without_copies(seen)
    by_key = seen.any(dim=2)
    rows = by_key[:, :, None]
    hidden = seen if mask.dtype == torch.bool else (seen | (mask <= HIDDEN))
    flags = [hidden.all() if mask.dtype != torch.bool else by_key.new_ones(())]
    flags += [(seen == rows).all(), (by_key == by_key[:, :1]).all(), by_key.all()]
    square = seen.shape[2] == seen.shape[3]
    if square:
        frames = torch.arange(seen.shape[2], device=seen.device) // frame
        flags.append((seen == (rows & (frames[:, None] >= frames))).all())
    told = torch.stack(flags).tolist()
    plain, padding, alike, whole, causal = told if square else (*told, False)
    if not plain:
        raise ValueError(f"{name}: got a finite bias among its values, {_TAKES}")
    if not padding and not causal:
        raise ValueError(f"{name}: got one that differs from query to query, {_TAKES}")
    if whole:
        return Said(None if padding else FrameCausal(frame), False)
    return _of_keys(by_key, shape, not alike, None if padding else FrameCausal(frame))


def _without_copies(seen: Tensor) -> Tensor:
    """seen, with dimensions of stride 0 cut to 1: expanded, all of their entries are one."""
    for dim in range(1, 3):
        if seen.shape[dim] > 1 and seen.stride(dim) == 0:
            seen = seen.narrow(dim, 0, 1)
    return seen


def _of_keys(
    by_key: Tensor, shape: tuple[int, ...], by_head: bool, order: FrameCausal | None
) -> Said:
    """by_key: bool [B or 1, H or 1, Tk]."""
    samples, heads, _, keys = shape
    if by_head:
        keep = by_key.expand(samples, heads, keys).reshape(samples * heads, keys)
    else:
        keep = by_key[:, 0].expand(samples, keys)
    rule: Rule = KeyPadding(keep.clone())
    return Said(rule if order is None else rule & order, by_head)
