"""transformers' attention masks as this library's rules, by what they say."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from vicreg_kernels.attention import FrameCausal, KeyPadding
from vicreg_kernels.attention.masks import Rule

# What an additive mask hides with: float16's least number or below, down to -inf.
HIDDEN = float(torch.finfo(torch.float16).min)
_TAKES = (
    "takes one that says which keys are padding, for all heads or each, with a causal order or "
    "without; set_attn_implementation('sdpa') takes any"
)


class Said(NamedTuple):
    """What a mask says. by_head: rule is KeyPadding of [B H, Tk], samples and heads together."""

    rule: Rule | None
    by_head: bool


def make(*, q_length: int, mask_function: Any = None, **rest: Any) -> Tensor | None:
    """transformers' mask function: sdpa's, but for padding alone [B, 1, 1, Tk]."""
    if mask_function is bidirectional_mask_function:
        q_length = 1
    if mask_function is not None:
        rest["mask_function"] = mask_function
    made: Tensor | None = sdpa_mask(q_length=q_length, **rest)
    return made


def read(mask: Tensor, samples: int, heads: int, queries: int, keys: int) -> Said:
    """The rule of a mask that broadcasts to [samples, heads, queries, keys], boolean (True: seen)
    or additive (0, or -65504 and below).

    What a mask on a device says is read once and kept with it, since that waits for the device.
    Raises a ValueError where it says anything else.
    """
    shape = (samples, heads, queries, keys)
    if mask.dim() != 4 or any(n not in (1, m) for n, m in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}, takes one that broadcasts to {shape}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention_mask: got dtype {mask.dtype}, takes bool or floating point")
    if torch.compiler.is_compiling():
        return _of_keys(_unread(mask), shape, mask.shape[1] > 1, False)
    if mask.is_inference():
        return _read(mask, shape)
    key, kept = (mask._version, shape), mask.__dict__.get("_vicreg_kernels_said")
    if kept is None or kept[0] != key:
        kept = (key, _read(mask, shape))
        mask.__dict__["_vicreg_kernels_said"] = kept
    said: Said = kept[1]
    return said


def _unread(mask: Tensor) -> Tensor:
    """bool [B, heads, Tk] of a mask whose values cannot be looked at."""
    if mask.dtype != torch.bool or mask.shape[2] != 1:
        raise ValueError(
            f"attention_mask: got {mask.dtype} {tuple(mask.shape)} inside torch.compile, takes "
            "bool [B, 1, 1, Tk] there, whose meaning does not depend on its values"
        )
    return mask[:, :, 0]


def _read(mask: Tensor, shape: tuple[int, ...]) -> Said:
    seen = mask if mask.dtype == torch.bool else mask == 0
    seen = _without_copies(seen)
    by_key = seen.any(dim=2)
    rows = by_key[:, :, None]
    hidden = seen if mask.dtype == torch.bool else (seen | (mask <= HIDDEN))
    flags = [hidden.all() if mask.dtype != torch.bool else by_key.new_ones(())]
    flags += [(seen == rows).all(), (by_key == by_key[:, :1]).all(), by_key.all()]
    square = seen.shape[2] == seen.shape[3]
    flags.append((seen == (rows & seen.new_ones(seen.shape[2:]).tril())).all() if square else None)
    told = torch.stack([flag for flag in flags if flag is not None]).tolist()
    plain, padding, alike, whole, causal = told if square else (*told, False)
    if not plain:
        raise ValueError(f"attention_mask: got a finite bias among its values, {_TAKES}")
    if not padding and not causal:
        raise ValueError(f"attention_mask: got one that differs from query to query, {_TAKES}")
    if whole:
        return Said(None if padding else FrameCausal(1), False)
    return _of_keys(by_key, shape, not alike, not padding)


def _without_copies(seen: Tensor) -> Tensor:
    """seen, with dimensions of stride 0 cut to 1: expanded, all of their entries are one."""
    for dim in range(1, 3):
        if seen.shape[dim] > 1 and seen.stride(dim) == 0:
            seen = seen.narrow(dim, 0, 1)
    return seen


def _of_keys(by_key: Tensor, shape: tuple[int, ...], by_head: bool, causal: bool) -> Said:
    """by_key: bool [B or 1, H or 1, Tk]."""
    samples, heads, _, keys = shape
    if by_head:
        keep = by_key.expand(samples, heads, keys).reshape(samples * heads, keys)
    else:
        keep = by_key[:, 0].expand(samples, keys)
    rule: Rule = KeyPadding(keep.clone())
    return Said(rule & FrameCausal(1) if causal else rule, by_head)
