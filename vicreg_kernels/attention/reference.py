"""The ops in plain PyTorch: the specification every backend is held to.

The rules are written out as a boolean matrix and the scores as another, differentiable by autograd
to any order and float64-capable. What never makes them lives in the other backends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_kernels.attention.masks import MaskArguments
from vicreg_kernels.attention.rope import Rope3d
from vicreg_kernels.core import library


def places(offsets: Tensor | None, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(sample, place in the sample) of each of `tokens` packed tokens; offsets None: one sample."""
    at = torch.arange(tokens, device=device)
    if offsets is None:
        return torch.zeros_like(at), at
    offsets = offsets.long()
    sample = torch.searchsorted(offsets[1:].contiguous(), at, right=True)
    return sample, at - offsets[sample]


def visible(rules: MaskArguments, tokens: int, keys: int, device: torch.device) -> Tensor:
    """bool [B or 1, tokens, keys]: whether a query sees a key."""
    q_sample, i = places(rules.q_offsets, tokens, device)
    k_sample, j = places(rules.k_offsets, keys, device)
    seen = (q_sample[:, None] == k_sample[None, :])[None]
    if rules.tokens_per_frame:
        ahead = i[:, None] // rules.tokens_per_frame - j[None, :] // rules.tokens_per_frame
        seen = seen & (ahead >= 0)
        if rules.window:
            seen = seen & (ahead < rules.window)
    if rules.bounds is not None:
        # A token's block: how many of its sample's bounds lie at or before it; 0 is the context.
        bounds = rules.bounds.long()
        if rules.q_offsets is not None:
            own = bounds[q_sample] if bounds.shape[0] > 1 else bounds
            block = (own <= i[:, None]).sum(dim=-1)[None]  # [1, tokens]
        else:
            block = (bounds[:, None, :] <= i[:, None]).sum(dim=-1)  # [B or 1, tokens]
        same = block[:, :, None] == block[:, None, :]
        inside = (block < bounds.shape[1])[:, None, :]
        seen = seen & ((block == 0)[:, None, :] | (same & inside))
    if rules.lengths is not None:
        seen = seen & (j < rules.lengths.long()[:, None, None])
    if rules.keep is not None:
        seen = seen & rules.keep[:, None, :]
    return seen


def rotate(x: Tensor, rope: Rope3d, index: Tensor | None, offsets: Tensor | None) -> Tensor:
    """x: [B, H, T, d] turned by each token's index [B or 1, T], None: its place in its sample."""
    if index is None:
        index = places(offsets, x.shape[2], x.device)[1][None]
    index = index.long()
    _, height, width = rope.grid
    columns = index % width
    rows = index // width % height
    axes = (index // (width * height), rows, columns)[3 - rope.axes :]
    angles = [rope.angles(axis.to(x.dtype), x.shape[-1]) for axis in axes]
    angle = torch.cat(angles, dim=-1)[:, None]  # [B or 1, 1, T, rotated]
    turned, rest = x.split([angle.shape[-1], x.shape[-1] - angle.shape[-1]], dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    partner = torch.stack((-odd, even), dim=-1).flatten(-2)
    return torch.cat((turned * angle.cos() + partner * angle.sin(), rest), dim=-1)


def scores_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Compute scale q k^T. If products may pass the dtype's largest number, each query is first
    multiplied by a power of two and its scores by the inverse, which rounds nothing. Otherwise a
    partial sum could become -inf and drop its key from the softmax.
    """
    scaled = scale * q
    if 0 in (q.numel(), k.numel()):
        return scaled @ k.transpose(-1, -2)
    size = scaled.detach().abs().amax(dim=-1, keepdim=True)
    most = torch.finfo(q.dtype).max
    largest = k.detach().abs().nan_to_num(most, most).amax(dim=(-2, -1), keepdim=True)
    exponent = torch.frexp(size).exponent + 7
    wide = (size > most / k.shape[-1] / largest.clamp(min=1.0)) & size.isfinite()
    exponent = torch.where(wide, exponent, 0)
    first = exponent // 2
    one = torch.ones_like(size)
    shrunk = scaled * torch.ldexp(one, -first) * torch.ldexp(one, first - exponent)
    scores = shrunk @ k.transpose(-1, -2)
    return scores * torch.ldexp(one, first) * torch.ldexp(one, exponent - first)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: MaskArguments,
    rope: Rope3d | None,
    indices: tuple[Tensor | None, Tensor | None],
    scale: float,
) -> Tensor:
    """softmax(scale rot(q) rot(k)^T, seen keys) v for [B, H, T, d]; no key seen: zeros.

    Half inputs are computed in float32 and rounded once, whatever autocast says.
    """
    with library.no_autocast(q.device):
        given = q.dtype
        dtype = torch.float64 if given == torch.float64 else torch.float32
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if rope is not None:
            q = rotate(q, rope, indices[0], rules.q_offsets)
            k = rotate(k, rope, indices[1], rules.k_offsets)
        seen = visible(rules, q.shape[2], k.shape[2], q.device)[:, None]
        # What no query sees may hold anything: 0 times NaN would be NaN.
        hidden = ~seen.any(dim=-2).unsqueeze(-1)
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        scores = scores_of(q, k, scale)
        # softmax over what is seen; a row that sees nothing is finite throughout, and zero.
        scores = scores.masked_fill(~seen, float("-inf"))
        empty = ~seen.any(dim=-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(~seen, 0.0)
        return (weights @ v).to(given)
