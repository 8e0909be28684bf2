"""The ops of a method, by vicreg_kernels on packed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import vicreg_kernels as vk
from vicreg_jepa.models.masks import Places
from vicreg_jepa.models.vit import Attend, Grid
from vicreg_jepa.ops.common import Sequences, Weights, by_frame


def _offsets(places: Sequence[Tensor]) -> Tensor:
    return torch.tensor([0, *(p.numel() for p in places)]).cumsum(0)


class Fused:
    """The ops of vicreg_kernels on packed tokens."""

    name = "fused"

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend

    def take(self, x: Tensor, places: Places) -> Sequences:
        """Take each sample's tokens at `places` from x [B, T, D]."""
        index, offsets = torch.cat(places).to(x.device), _offsets(places)
        tokens = vk.gather_tokens(x, index, offsets=offsets, backend=self.backend)
        return Sequences(tokens, index, offsets, places=places)

    def attend(
        self, sequences: Sequences | None, rope: Grid | None, apart: Grid | None = None
    ) -> Attend:
        """Return the attention function for these sequences; None: for dense tokens [B, T, D].

        apart: the grid, if its frames do not see each other; None: every token of a clip sees all
        others.
        """
        if sequences is None:
            turn = None if rope is None else vk.Rope3d((apart.frame if apart else rope).axes)
            return by_frame(apart, lambda module, x: module(x, rope=turn))
        index, offsets = sequences.index, sequences.offsets
        if apart is not None:
            # V-JEPA's rotation is not quite relative, so each frame gets the positions of a frame
            # by itself.
            index, offsets = index % apart.frame.tokens, _frame_offsets(sequences, apart)
        turn = None if rope is None else vk.Rope3d(rope.axes, index)
        assert offsets is not None
        # The offsets are moved and read here, once for all blocks: a compiled block can do neither.
        longest = int(offsets.diff().max())
        rule = vk.Ragged(offsets.to(sequences.x.device), max_length=longest)
        return lambda module, x: module(x, mask=rule, rope=turn)

    def attend_causal(self, grid: Grid, frames: int) -> Attend:
        """Rotary attention over dense tokens of the first frames of a grid; no token sees a later
        frame.
        """
        turn = vk.Rope3d((frames, grid.height, grid.width))
        rule = vk.FrameCausal(grid.frame.tokens)
        return lambda module, x: module(x, mask=rule, rope=turn)

    def attend_history(self, q: Tensor, k: Tensor, v: Tensor, tokens: int, history: int) -> Tensor:
        """Attention of frames of `tokens` tokens over time, with rotary positions in time: each
        frame sees itself and the history - 1 frames before it.

        k, v [B, heads, Tk, d]; q [B, heads, Tq, d] of the same frames, or of the last one alone
        where all are in its history.
        """
        frame = torch.arange(k.shape[2], device=k.device) // tokens
        turn = vk.Rope3d((k.shape[2] // tokens,), frame[-q.shape[2] :], frame, layout="axial")
        rule = None if q.shape[2] == tokens else vk.FrameCausal(tokens, history)
        return vk.masked_attention(q, k, v, mask=rule, rope=turn, backend=self.backend)

    def modulated_layer_norm(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x [..., tokens, D], shift and scale [..., D]: a vector for each frame of tokens."""
        return vk.modulated_layer_norm(x, shift, scale, backend=self.backend)

    def gated_residual(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """x, y [..., tokens, D], gate [..., D]."""
        return vk.gated_residual(x, y, gate, backend=self.backend)

    def mean(self, sequences: Sequences) -> Tensor:
        """The mean of each sequence's tokens, [P, D]."""
        assert sequences.offsets is not None
        lengths = sequences.offsets.diff().to(sequences.x.device)
        return torch.segment_reduce(sequences.x, "mean", lengths=lengths, axis=0)

    def rows(self, sequences: Sequences) -> Tensor:
        """All tokens, [total, D]."""
        return sequences.x

    def assemble(
        self, context: Sequences, mask_token: Tensor, targets: list[Places], table: Tensor | None
    ) -> Sequences:
        """For each of the M targets of each sample, the context and mask tokens in grid order."""
        assembled = vk.assemble_tokens(
            context.x.repeat(len(targets), 1),
            context.index.repeat(len(targets)),
            mask_token,
            torch.cat([p for places in targets for p in places]).to(context.x.device),
            positions=table,
            context_offsets=_repeat_offsets(context.offsets, len(targets)),
            target_offsets=_offsets([p for places in targets for p in places]),
            backend=self.backend,
        )
        return Sequences(assembled.tokens, assembled.index, assembled.offsets, order=assembled)

    def predictions(self, sequences: Sequences) -> Tensor:
        return sequences.order.targets(sequences.x, backend=self.backend)

    def prediction_loss(
        self,
        predictions: Tensor,
        wanted: Tensor,
        targets: list[Places],
        kind: str,
        normalise: bool,
    ) -> Tensor:
        """The loss of predictions, in the order of targets, against `wanted` [B, T, D]; normalise:
        layer-norm `wanted` first.
        """
        offsets = [_offsets(places) for places in targets]
        parts = predictions.split([int(o[-1]) for o in offsets])
        index = [torch.cat(places).to(wanted.device) for places in targets]
        return vk.prediction_loss(
            list(parts), wanted, index, kind=kind, normalize_target=normalise, offsets=offsets,
            reduction="tokens", backend=self.backend,
        )  # fmt: skip

    def teacher(self, module: nn.Module, momentum: float, steps: int) -> nn.Module:
        return vk.EMA(module, momentum, schedule="linear", total_steps=steps, backend=self.backend)

    def vicreg(self, x: Tensor, y: Tensor, weights: Weights, process_group: Any) -> Tensor:
        names = ("invariance_weight", "variance_weight", "covariance_weight")
        settings = dict(zip(names, weights, strict=True)) | self._shared(process_group)
        return vk.vicreg_loss(x, y, **settings)

    def variance_covariance(self, z: Tensor, process_group: Any) -> tuple[Tensor, Tensor]:
        """z [N, D], or [G, N, D]: the mean over groups."""
        return vk.variance_covariance(z, **self._shared(process_group))

    def sigreg(self, z: Tensor, slices: int, step: int, process_group: Any) -> Tensor:
        """z [V, N, D]."""
        return vk.sigreg_loss(z, slices=slices, step=step, **self._shared(process_group))

    def _shared(self, process_group: Any) -> dict[str, Any]:
        return {"backend": self.backend, "process_group": process_group}


def _frame_offsets(sequences: Sequences, grid: Grid) -> Tensor:
    """The offset of the first token of each frame of each sequence; tokens are in the grid's
    order.
    """
    assert sequences.places is not None
    frame = torch.cat(
        [p // grid.frame.tokens + i * grid.frames for i, p in enumerate(sequences.places)]
    )
    counts = torch.bincount(frame, minlength=len(sequences.places) * grid.frames)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _repeat_offsets(offsets: Tensor | None, times: int) -> Tensor:
    assert offsets is not None
    return torch.cat((torch.zeros(1, dtype=offsets.dtype), offsets.diff().repeat(times).cumsum(0)))
