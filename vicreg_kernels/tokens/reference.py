"""The tokens ops in plain PyTorch: the specification every backend is held to.

Written as the published code computes them (gathers through an expanded index, a layer norm of all
teacher tokens, concatenation and argsort), differentiable by autograd to any order, and
float64-capable. No tricks: what is fast lives in the other backends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vicreg_kernels.core import library

# Norms are kept from 0 by this much, as in torch.nn.functional.cosine_similarity.
LEAST_NORM = 1e-8


def samples_of(offsets: Tensor, total: int) -> Tensor:
    """The sample of each packed row: [total]."""
    lengths = offsets.diff()
    ids = torch.arange(lengths.shape[0], device=offsets.device)
    return torch.repeat_interleave(ids, lengths, output_size=total)


def gather(x: Tensor, index: Tensor, offsets: Tensor | None) -> Tensor:
    """x: [B, T, D]; index: [P, K], P a multiple of B (mask-major), or packed [R] with offsets."""
    index = index.long()
    if offsets is not None:
        return x[samples_of(offsets, index.shape[0]), index]
    repeats = index.shape[0] // x.shape[0]
    x = x.repeat(repeats, 1, 1) if repeats != 1 else x
    return torch.gather(x, 1, index[..., None].expand(-1, -1, x.shape[-1]))


def scatter(
    rows: Tensor, index: Tensor, offsets: Tensor | None, batch: int, length: int, fill: float
) -> Tensor:
    """rows: [B, K, D] or [R, D] -> [B, length, D]."""
    index = index.long()
    out = rows.new_full((batch, length, rows.shape[-1]), fill)
    if offsets is not None:
        return out.index_put((samples_of(offsets, index.shape[0]), index), rows)
    return out.scatter(1, index[..., None].expand(-1, -1, rows.shape[-1]), rows)


def loss(
    pred: Tensor,
    teacher: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    kind: str,
    normalize: bool,
    beta: float,
    eps: float,
) -> Tensor:
    """pred: [P, K, D] or [R, D]. Half inputs are computed in float32, whatever autocast says."""
    with library.no_autocast(pred.device):
        dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
        pred, teacher = pred.to(dtype), teacher.detach().to(dtype)
        if normalize:
            square = teacher.var(dim=-1, correction=0, keepdim=True) + eps
            known = (square >= torch.finfo(dtype).tiny) & square.isfinite()
            teacher = F.layer_norm(teacher, (teacher.shape[-1],), eps=eps)
            teacher = torch.where(known, teacher, float("nan"))
        target = gather(teacher, index, offsets)
        if kind == "smooth_l1":
            return F.smooth_l1_loss(pred, target, beta=beta)
        if kind == "l1":
            return F.l1_loss(pred, target)
        if kind == "mse":
            return F.mse_loss(pred, target)
        norms = [torch.linalg.vector_norm(z, dim=-1) for z in (pred, target)]
        # Infinity less itself is NaN: of squares past float32 the cosine is unknown, and not 0.
        safe = [norm.clamp_min(LEAST_NORM) + (norm - norm) for norm in norms]
        return (1 - (pred * target).sum(-1) / safe[0] / safe[1]).mean()


def assemble(
    context: Tensor,
    context_index: Tensor,
    target: Tensor,
    target_index: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens, index, context_rows, target_rows) of context [C, Kc, D], in turns, and target [D]
    or [P, Kt, D].
    """
    count = target_index.shape[0]
    repeats = count // context.shape[0]
    context, context_index = context.repeat(repeats, 1, 1), context_index.repeat(repeats, 1)
    kept = context_index.shape[1]
    dtype = torch.float64 if context.dtype == torch.float64 else torch.float32
    if target.dim() == 1:
        target = target.expand(count, target_index.shape[1], -1)
    tokens = torch.cat([context.to(dtype), target.to(dtype)], dim=1)
    index = torch.cat([context_index, target_index], dim=1)
    order = torch.argsort(index, dim=1, stable=True)
    if positions is not None:
        tokens = tokens + positions.to(dtype)[index.long()]
    tokens = torch.gather(tokens, 1, order[..., None].expand(-1, -1, tokens.shape[-1]))
    places = torch.argsort(order, dim=1).to(index.dtype)
    index = torch.gather(index, 1, order)
    return tokens.to(context.dtype), index, places[:, :kept], places[:, kept:]


def assemble_ragged(
    context: Tensor,
    context_index: Tensor,
    target: Tensor,
    target_index: Tensor,
    positions: Tensor | None,
    context_offsets: Tensor,
    target_offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for packed context [Rc, D] and target [D] or [Rt, D]; rows of the packed whole."""
    kept, total = context.shape[0], context.shape[0] + target_index.shape[0]
    dtype = torch.float64 if context.dtype == torch.float64 else torch.float32
    if target.dim() == 1:
        target = target.expand(target_index.shape[0], -1)
    tokens = torch.cat([context.to(dtype), target.to(dtype)])
    index = torch.cat([context_index, target_index])
    samples = torch.cat(
        [samples_of(context_offsets, kept), samples_of(target_offsets, total - kept)]
    )
    if positions is not None:
        tokens = tokens + positions.to(dtype)[index.long()]
    by_position = torch.argsort(index, stable=True)
    order = by_position[torch.argsort(samples[by_position], stable=True)]
    places = torch.argsort(order).to(index.dtype)
    return tokens[order].to(context.dtype), index[order], places[:kept], places[kept:]
