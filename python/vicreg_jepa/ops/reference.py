"""The ops of a method in plain PyTorch, as the published repositories compute them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vicreg_kernels as vk
from vicreg_jepa.models.masks import Places
from vicreg_jepa.models.vit import Attend, Grid
from vicreg_jepa.ops import published
from vicreg_jepa.ops.common import Sequences, Weights, by_frame

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth_l1": F.smooth_l1_loss,
    "l1": F.l1_loss,
    "mse": F.mse_loss,
}


class Reference:
    """Plain PyTorch on padded tokens."""

    name = "reference"

    def take(self, x: Tensor, places: Places) -> Sequences:
        index, keep = (z.to(x.device) for z in padded(places))
        return Sequences(published.gather(x, index), index, keep=keep)

    def attend(
        self, sequences: Sequences | None, rope: Grid | None, apart: Grid | None = None
    ) -> Attend:
        if sequences is None:
            grid = apart.frame if apart and rope else rope
            return by_frame(apart, partial(published.attention, index=None, keep=None, grid=grid))
        assert sequences.keep is not None
        index, keep = sequences.index, sequences.keep[:, None]  # [P, 1 or queries, keys]
        if apart is not None:
            frame, index = index // apart.frame.tokens, index % apart.frame.tokens
            itself = torch.eye(frame.shape[1], dtype=torch.bool, device=keep.device)
            # Padding sees itself, so that no row of the softmax is empty.
            keep = (keep & (frame[:, :, None] == frame[:, None])) | itself
        return partial(published.attention, index=index, keep=keep, grid=rope)

    def attend_causal(self, grid: Grid, frames: int) -> Attend:
        part = Grid(frames, grid.height, grid.width)

        def attend(module: vk.MaskedAttention, x: Tensor) -> Tensor:
            frame = torch.arange(part.tokens, device=x.device) // part.frame.tokens
            keep = frame[None, :, None] >= frame[None, None]
            return published.attention(module, x, index=None, keep=keep, grid=part)

        return attend

    def attend_history(self, q: Tensor, k: Tensor, v: Tensor, tokens: int, history: int) -> Tensor:
        frame = torch.arange(k.shape[2], device=k.device) // tokens
        back = frame[-q.shape[2] :, None] - frame
        q, k = published.rotate_in_time(q, frame[-q.shape[2] :]), published.rotate_in_time(k, frame)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < history))

    def modulated_layer_norm(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return published.modulated_layer_norm(x, shift, scale)

    def gated_residual(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return published.gated_residual(x, y, gate)

    def mean(self, sequences: Sequences) -> Tensor:
        assert sequences.keep is not None
        keep = sequences.keep.unsqueeze(-1)
        return (sequences.x * keep).sum(dim=1) / keep.sum(dim=1)

    def rows(self, sequences: Sequences) -> Tensor:
        return sequences.x[sequences.keep]

    def assemble(
        self, context: Sequences, mask_token: Tensor, targets: list[Places], table: Tensor | None
    ) -> Sequences:
        times = len(targets)
        index, keep = (
            z.to(context.x.device) for z in padded([p for places in targets for p in places])
        )
        masked = mask_token.to(context.x.dtype).expand(*index.shape, -1)
        x = torch.cat((context.x.repeat(times, 1, 1), masked), dim=1)
        places = torch.cat((context.index.repeat(times, 1), index), dim=1)
        if table is not None:
            x = x + table[places]
        assert context.keep is not None
        keep = torch.cat((context.keep.repeat(times, 1), keep), dim=1)
        order = places.masked_fill(~keep, 2**31).argsort(dim=1, stable=True)
        rows = order.argsort(dim=1)[:, context.index.shape[1] :]
        return Sequences(
            published.gather(x, order),
            places.gather(1, order),
            keep=keep.gather(1, order),
            order=rows,
        )

    def predictions(self, sequences: Sequences) -> Tensor:
        return published.gather(sequences.x, sequences.order)

    def prediction_loss(
        self,
        predictions: Tensor,
        wanted: Tensor,
        targets: list[Places],
        kind: str,
        normalise: bool,
    ) -> Tensor:
        index, keep = (z.to(wanted.device) for z in padded([p for m in targets for p in m]))
        if normalise:
            wanted = F.layer_norm(wanted, wanted.shape[-1:])
        wanted = published.gather(wanted.repeat(len(targets), 1, 1), index)[keep]
        return LOSSES[kind](predictions[keep], wanted)

    def teacher(self, module: nn.Module, momentum: float, steps: int) -> nn.Module:
        return published.EMA(module, momentum, steps)

    def vicreg(self, x: Tensor, y: Tensor, weights: Weights, process_group: Any) -> Tensor:
        x, y = (published.gathered(z, process_group) for z in (x, y))
        names = ("invariance_weight", "variance_weight", "covariance_weight")
        return published.vicreg_loss(x, y, **dict(zip(names, weights, strict=True)))

    def variance_covariance(self, z: Tensor, process_group: Any) -> tuple[Tensor, Tensor]:
        groups = z if z.dim() == 3 else z[None]
        groups = published.gathered(groups.transpose(0, 1), process_group).transpose(0, 1)
        terms = [published.variance_covariance(group) for group in groups]
        variance, covariance = (torch.stack(term).mean() for term in zip(*terms, strict=True))
        return variance, covariance

    def sigreg(self, z: Tensor, slices: int, step: int, process_group: Any) -> Tensor:
        z = published.gathered(z.transpose(0, 1), process_group).transpose(0, 1)
        # The same directions as the fused op's: a comparison needs one loss.
        directions = vk.sigreg_directions(z.shape[-1], slices, step=step, device=z.device)
        return published.sigreg_loss(z, directions)


def padded(places: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[P, longest] places, padded with 0, and which of them are tokens."""
    index = nn.utils.rnn.pad_sequence(list(places), batch_first=True)
    lengths = torch.tensor([p.numel() for p in places])
    return index, torch.arange(index.shape[1]) < lengths[:, None]
