"""Losses, attention, gathers and teacher as published code computes them, for comparison.

facebookresearch/vicreg forms the D x D covariance of each view and copies its off-diagonal
elements out with a strided view, squares and sums them. This is eager PyTorch, differentiated by
autograd, and also runs in float64.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_jepa.models.vit import Grid


def off_diagonal(square: Tensor) -> Tensor:
    """The off-diagonal elements of [D, D], row by row: a copy, [D (D - 1)]."""
    edge = square.shape[0]
    # Without its last element the matrix reads as rows of D + 1, each beginning on the diagonal.
    return square.flatten()[:-1].view(edge - 1, edge + 1)[:, 1:].flatten()


def vicreg_loss(
    x: Tensor,
    y: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    margin: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    """x, y: the two views' embeddings, [N, D] -> the loss, a 0-d tensor of their dtype."""
    rows, dim = x.shape
    invariance = torch.nn.functional.mse_loss(x, y)
    variance = covariance = x.new_zeros(())
    for view in (x, y):
        centred = view - view.mean(dim=0)
        std = torch.sqrt(centred.var(dim=0) + eps)  # [D]
        variance = variance + torch.relu(margin - std).mean() / 2
        matrix = centred.T @ centred / (rows - 1)  # [D, D]
        covariance = covariance + off_diagonal(matrix).pow_(2).sum() / dim
    return (
        invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    )


def variance_covariance(
    z: Tensor, *, margin: float = 1.0, eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """The variance and covariance terms of z: [N, D]."""
    rows, dim = z.shape
    centred = z - z.mean(dim=0)
    variance = torch.relu(margin - torch.sqrt(centred.var(dim=0) + eps)).mean()
    matrix = centred.T @ centred / (rows - 1)
    return variance, off_diagonal(matrix).pow_(2).sum() / dim


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows of x [B, T, D] at index [B, K], with an expanded index [B, K, D]."""
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def rotate(x: Tensor, places: Tensor, grid: Grid) -> Tensor:
    """Rotate x [B, H, T, d] by its places [B or 1, T], in V-JEPA 2's order of frequencies."""
    part = 2 * (x.shape[-1] // 3 // 2)
    plane = grid.height * grid.width
    axes = (places // plane, places // grid.width % grid.height, places % grid.width)
    turned = []
    for axis, position in enumerate(axes):
        z = x[..., axis * part : (axis + 1) * part]
        frequency = 10000 ** (-torch.arange(part // 2, device=x.device) / (part / 2))
        angle = (position[:, None, :, None] * frequency).repeat(1, 1, 1, 2)
        even, odd = z.unflatten(-1, (-1, 2)).unbind(-1)
        partner = torch.stack((-odd, even), dim=-1).flatten(-2)
        turned.append((z * angle.cos() + partner * angle.sin()).to(x.dtype))
    return torch.cat((*turned, x[..., 3 * part :]), dim=-1)


def rotate_in_time(x: Tensor, frame: Tensor) -> Tensor:
    """Rotate x [B, H, T, d] by its tokens' frames [T]; elements 2i and 2i + 1 turn as a pair."""
    half = x.shape[-1] // 2
    frequency = 10000 ** (-torch.arange(half, device=x.device) / half)
    angle = frame[:, None] * frequency
    even, odd = x.unflatten(-1, (half, 2)).unbind(-1)
    turned = (even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin())
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [..., T, D]; shift, scale [..., D] are repeated for each of the T tokens."""
    shift, scale = (_repeated(z, x) for z in (shift, scale))
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x, y [..., T, D]; gate [..., D] is repeated for each of the T tokens."""
    return x + _repeated(gate, x) * y


def _repeated(z: Tensor, x: Tensor) -> Tensor:
    return z.unsqueeze(-2).repeat_interleave(x.shape[-2], dim=-2)


def attention(
    module: nn.Module, x: Tensor, *, index: Tensor | None, keep: Tensor | None, grid: Grid | None
) -> Tensor:
    """Self-attention of padded tokens [B, T, D]; keep: bool [B, 1 or T, T], the keys that each
    query sees.
    """
    three = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = three.unbind(0)
    if grid is not None:
        if index is None:
            index = torch.arange(grid.tokens, device=x.device)[None]
        q, k = rotate(q, index, grid), rotate(k, index, grid)
    mask = None if keep is None else keep[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return module.proj(out.transpose(1, 2).flatten(-2))


class EMA(nn.Module):
    """The published teacher update: parameter by parameter, with momentum rising linearly to 1."""

    def __init__(self, module: nn.Module, momentum: float, steps: int) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.momentum, self.steps = momentum, steps
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        part = min(int(self.step) / self.steps, 1.0)
        momentum = self.momentum + (1.0 - self.momentum) * part
        for target, online in zip(self.module.parameters(), module.parameters(), strict=True):
            target.mul_(momentum).add_(online, alpha=1.0 - momentum)
        for target, online in zip(self.module.buffers(), module.buffers(), strict=True):
            target.copy_(online)
        self.step += 1


def gathered(z: Tensor, process_group: Any) -> Tensor:
    """Every rank's rows, with a gradient, as the published code gathers them."""
    if process_group is None:
        return z
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(z.contiguous()))


def sigreg_loss(z: Tensor, directions: Tensor, knots: int = 17, t_max: float = 3.0) -> Tensor:
    """The Epps-Pulley statistic of z [V, N, D] along directions [D, M], as LeJEPA publishes it:
    every knot's cosine and sine of every projection, [V, N, M, K].
    """
    t = torch.linspace(0, t_max, knots, device=z.device)
    step = t_max / (knots - 1)
    weights = torch.full_like(t, 2 * step)
    weights[[0, -1]] = step
    phi = torch.exp(-t.square() / 2)
    angles = (z @ directions).unsqueeze(-1) * t
    error = (angles.cos().mean(-3) - phi).square() + angles.sin().mean(-3).square()
    return (error @ (weights * phi)).mean() * z.shape[-2]
