"""One switch: what a method asks for, with the fused ops or as published code does it.

A method is written once over these few steps. `Fused` keeps ragged batches packed; `Reference` pads
to the longest sample, masks the padding, rotates queries and keys eagerly, gathers through
expanded int64 indices, sorts with an argsort, forms D x D covariances and updates the teacher
tensor by tensor. Both take the same masks, so they compute the same loss; published I-JEPA and
V-JEPA differ in cutting every sample to the shortest of the batch: they train on other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vicreg_kernels as vk
from jepa import plain
from jepa.masks import Masks, Places
from jepa.vit import Attend, Grid

KERNELS = ("fused", "reference")
# Of invariance, variance and covariance.
Weights = tuple[float, float, float]


@dataclass(frozen=True)
class Sequences:
    """Tokens of a batch of sequences of different lengths, and their places in the grid.

    places: of each sequence, on the host, where they were taken from a grid.
    Fused: x [total, D], index [total], offsets [P + 1] on the host. Reference: x [P, L, D],
    index [P, L], keep bool [P, L], padded behind.
    """

    x: Tensor
    index: Tensor
    offsets: Tensor | None = None
    keep: Tensor | None = None
    order: Any = None
    places: Places | None = None

    def with_tokens(self, x: Tensor) -> Sequences:
        return replace(self, x=x)


def _offsets(places: Sequence[Tensor]) -> Tensor:
    return torch.tensor([0, *(p.numel() for p in places)]).cumsum(0)


class Fused:
    """The ops of vicreg_kernels on packed tokens."""

    name = "fused"

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend

    def take(self, x: Tensor, places: Places) -> Sequences:
        """Each sample's tokens at `places` of x [B, T, D]."""
        index, offsets = torch.cat(places).to(x.device), _offsets(places)
        tokens = vk.gather_tokens(x, index, offsets=offsets, backend=self.backend)
        return Sequences(tokens, index, offsets, places=places)

    def attend(
        self, sequences: Sequences | None, rope: Grid | None, apart: Grid | None = None
    ) -> Attend:
        """How attention is computed over these sequences; None: dense tokens [B, T, D].

        apart: the grid whose frames do not see each other; None: a clip's tokens see them all.
        """
        if sequences is None:
            turn = None if rope is None else vk.Rope3d((apart.frame if apart else rope).axes)
            return _by_frame(apart, lambda module, x: module(x, rope=turn))
        index, offsets = sequences.index, sequences.offsets
        if apart is not None:
            # V-JEPA's rotation is not quite relative: a frame is placed as if it were alone.
            index, offsets = index % apart.frame.tokens, _frame_offsets(sequences, apart)
        turn = None if rope is None else vk.Rope3d(rope.axes, index)
        assert offsets is not None
        # Moved and read here, once for all blocks: a compiled block can do neither.
        longest = int(offsets.diff().max())
        rule = vk.Ragged(offsets.to(sequences.x.device), max_length=longest)
        return lambda module, x: module(x, mask=rule, rope=turn)

    def attend_causal(self, grid: Grid, frames: int) -> Attend:
        """Rotary attention over the first token frames of a grid, dense, to no later frame."""
        turn = vk.Rope3d((frames, grid.height, grid.width))
        rule = vk.FrameCausal(grid.frame.tokens)
        return lambda module, x: module(x, mask=rule, rope=turn)

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
        """For each of the M targets of each sample, its context and mask tokens in grid order."""
        made = vk.assemble_tokens(
            context.x.repeat(len(targets), 1),
            context.index.repeat(len(targets)),
            mask_token,
            torch.cat([p for places in targets for p in places]).to(context.x.device),
            positions=table,
            context_offsets=_repeat_offsets(context.offsets, len(targets)),
            target_offsets=_offsets([p for places in targets for p in places]),
            backend=self.backend,
        )
        return Sequences(made.tokens, made.index, made.offsets, order=made)

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
        """Of predictions in the order of targets, against wanted [B, T, D], layer-normed or not."""
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
        return vk.variance_covariance(z, **self._shared(process_group))

    def sigreg(self, z: Tensor, slices: int, step: int, process_group: Any) -> Tensor:
        """z [V, N, D]."""
        return vk.sigreg_loss(z, slices=slices, step=step, **self._shared(process_group))

    def _shared(self, process_group: Any) -> dict[str, Any]:
        return {"backend": self.backend, "process_group": process_group}


def _by_frame(apart: Grid | None, attend: Attend) -> Attend:
    """On dense tokens [B, T, D], each frame a sample of its own."""
    if apart is None:
        return attend

    def frames(module: vk.MaskedAttention, x: Tensor) -> Tensor:
        plane = apart.frame.tokens
        return attend(module, x.reshape(-1, plane, x.shape[-1])).reshape(x.shape)

    return frames


def _frame_offsets(sequences: Sequences, grid: Grid) -> Tensor:
    """Where the tokens of each sequence's frames begin; they lie in the grid's order."""
    assert sequences.places is not None
    frame = torch.cat(
        [p // grid.frame.tokens + i * grid.frames for i, p in enumerate(sequences.places)]
    )
    counts = torch.bincount(frame, minlength=len(sequences.places) * grid.frames)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _repeat_offsets(offsets: Tensor | None, times: int) -> Tensor:
    assert offsets is not None
    return torch.cat((torch.zeros(1, dtype=offsets.dtype), offsets.diff().repeat(times).cumsum(0)))


class Reference:
    """Plain PyTorch, as the published repositories compute it."""

    name = "reference"

    def take(self, x: Tensor, places: Places) -> Sequences:
        index, keep = (z.to(x.device) for z in padded(places))
        return Sequences(plain.gather(x, index), index, keep=keep)

    def attend(
        self, sequences: Sequences | None, rope: Grid | None, apart: Grid | None = None
    ) -> Attend:
        if sequences is None:
            grid = apart.frame if apart and rope else rope
            return _by_frame(apart, partial(plain.attention, index=None, keep=None, grid=grid))
        assert sequences.keep is not None
        index, keep = sequences.index, sequences.keep[:, None]  # [P, 1 or queries, keys]
        if apart is not None:
            frame, index = index // apart.frame.tokens, index % apart.frame.tokens
            own = torch.eye(frame.shape[1], dtype=torch.bool, device=keep.device)
            # Padding sees itself, so that no row of the softmax is empty.
            keep = (keep & (frame[:, :, None] == frame[:, None])) | own
        return partial(plain.attention, index=index, keep=keep, grid=rope)

    def attend_causal(self, grid: Grid, frames: int) -> Attend:
        part = Grid(frames, grid.height, grid.width)

        def attend(module: vk.MaskedAttention, x: Tensor) -> Tensor:
            frame = torch.arange(part.tokens, device=x.device) // part.frame.tokens
            keep = frame[None, :, None] >= frame[None, None]
            return plain.attention(module, x, index=None, keep=keep, grid=part)

        return attend

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
            plain.gather(x, order), places.gather(1, order), keep=keep.gather(1, order), order=rows
        )

    def predictions(self, sequences: Sequences) -> Tensor:
        return plain.gather(sequences.x, sequences.order)

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
        wanted = plain.gather(wanted.repeat(len(targets), 1, 1), index)[keep]
        loss = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss, "mse": F.mse_loss}[kind]
        return loss(predictions[keep], wanted)

    def teacher(self, module: nn.Module, momentum: float, steps: int) -> nn.Module:
        return plain.EMA(module, momentum, steps)

    def vicreg(self, x: Tensor, y: Tensor, weights: Weights, process_group: Any) -> Tensor:
        x, y = (plain.gathered(z, process_group) for z in (x, y))
        names = ("invariance_weight", "variance_weight", "covariance_weight")
        return plain.vicreg_loss(x, y, **dict(zip(names, weights, strict=True)))

    def variance_covariance(self, z: Tensor, process_group: Any) -> tuple[Tensor, Tensor]:
        return plain.variance_covariance(plain.gathered(z, process_group))

    def sigreg(self, z: Tensor, slices: int, step: int, process_group: Any) -> Tensor:
        z = plain.gathered(z.transpose(0, 1), process_group).transpose(0, 1)
        # The same directions as the fused op's: a comparison needs one loss.
        directions = vk.sigreg_directions(z.shape[-1], slices, step=step, device=z.device)
        return plain.sigreg_loss(z, directions)


Kernels = Fused | Reference


def named(name: str, backend: str | None = None) -> Kernels:
    if name == "fused":
        return Fused(backend)
    if name == "reference":
        if backend is not None:
            raise ValueError(f"backend: got {backend!r}, takes none with kernels='reference'")
        return Reference()
    raise ValueError(f"kernels: got {name!r}, takes one of {KERNELS}")


def padded(places: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[P, longest] places, padded with 0, and which of them are tokens."""
    index = nn.utils.rnn.pad_sequence(list(places), batch_first=True)
    lengths = torch.tensor([p.numel() for p in places])
    return index, torch.arange(index.shape[1]) < lengths[:, None]


def encode(encoder: Any, kernels: Kernels, x: Tensor, places: Places | None) -> Any:
    """The encoder on the tokens at `places`, as Sequences; None: on all of them, [B, T, D]."""
    tokens = encoder.embed(x)
    if places is None:
        return encoder.run(tokens, kernels.attend(None, encoder.rope, encoder.apart))
    seen = kernels.take(tokens, places)
    return seen.with_tokens(encoder.run(seen.x, kernels.attend(seen, encoder.rope, encoder.apart)))


def predict(predictor: Any, kernels: Kernels, context: Sequences, masks: Masks) -> Tensor:
    """The predictor's embeddings of the targets, as `prediction_loss` takes them."""
    narrow = context.with_tokens(predictor.predictor_embed(context.x))
    sequence = kernels.assemble(narrow, predictor.mask_token, masks.targets, predictor.table)
    x = predictor.run(sequence.x, kernels.attend(sequence, predictor.rope))
    return predictor.predictor_proj(kernels.predictions(sequence.with_tokens(x)))
