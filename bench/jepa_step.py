"""A V-JEPA 2-style training step, written with this library's ops and in plain PyTorch.

Encoder on ragged context tokens, predictor over context and mask tokens in grid order, teacher on
the whole clip, L1 on the teacher's layer-normed target tokens, backward, EMA of the teacher. Both
versions run on the same modules and take the same ragged masks, so their losses and gradients are
equal. `plain` pads to the longest sample and masks the padding, rotates queries and keys eagerly,
gathers through expanded int64 indices and updates the teacher parameter by parameter, as published
code does where it does not truncate to the shortest sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vicreg_kernels as vk
from bench import measure
from bench.case import Case, Plan
from vicreg_kernels.core import dispatch

TITLE = "V-JEPA 2-style step: encoder, predictor, teacher, backward and EMA"
CONTENDERS = {
    "plain": "plain PyTorch, padded to the longest sample",
    "compiled": "plain PyTorch under torch.compile",
}


@dataclass(frozen=True)
class Size:
    """A clip [frames, side, side] in patches of 2 x patch x patch, and the two transformers."""

    frames: int = 16
    side: int = 224
    patch: int = 16
    dim: int = 192
    heads: int = 3
    depth: int = 4
    predictor_dim: int = 96
    predictor_heads: int = 3
    predictor_depth: int = 2

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.frames // 2, self.side // self.patch, self.side // self.patch

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class Block(nn.Module):
    """A pre-norm transformer block; `attend` is how its attention is computed."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = vk.MaskedAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, attend: Callable[[vk.MaskedAttention, Tensor], Tensor]) -> Tensor:
        x = x + attend(self.attn, self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, attend: Callable[[vk.MaskedAttention, Tensor], Tensor]) -> Tensor:
        for block in self.blocks:
            x = block(x, attend)
        return self.norm(x)


class Encoder(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        kernel = (2, size.patch, size.patch)
        self.patch_embed = nn.Conv3d(3, size.dim, kernel, stride=kernel)
        self.transformer = Transformer(size.dim, size.heads, size.depth)

    def embed(self, video: Tensor) -> Tensor:
        """[B, 3, frames, side, side] -> [B, T, dim]."""
        return self.patch_embed(video).flatten(2).transpose(1, 2)


class Predictor(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Linear(size.dim, size.predictor_dim)
        self.mask_token = nn.Parameter(torch.randn(size.predictor_dim) * 0.02)
        self.transformer = Transformer(
            size.predictor_dim, size.predictor_heads, size.predictor_depth
        )
        self.proj = nn.Linear(size.predictor_dim, size.dim)


@dataclass(frozen=True)
class Masks:
    """One sorted list of grid places a sample, context and target."""

    context: list[Tensor]
    target: list[Tensor]

    @classmethod
    def tubes(cls, size: Size, batch: int, kept: tuple[int, int], seed: int = 0) -> Masks:
        """A random rectangle of columns hidden in every frame, so that the context keeps a number
        of tokens in the range `kept`; the target is what is hidden.
        """
        generator = torch.Generator().manual_seed(seed)
        frames, height, width = size.grid
        spatial, contexts, targets = height * width, [], []
        least, most = (-(-n // frames) for n in kept)
        for _ in range(batch):
            count = int(torch.randint(least, most + 1, (1,), generator=generator))
            order = torch.randperm(spatial, generator=generator)
            shift = spatial * torch.arange(frames)[:, None]
            contexts.append((order[:count].sort().values + shift).flatten())
            targets.append((order[count:].sort().values + shift).flatten())
        return cls(contexts, targets)


def _offsets(parts: list[Tensor]) -> Tensor:
    lengths = torch.tensor([0, *(part.numel() for part in parts)])
    return lengths.cumsum(0)


class Step(nn.Module):
    """The three networks and one step over them; `fused` or `plain` computes loss and gradients
    and then updates the teacher.
    """

    def __init__(self, size: Size, backend: str | None = None) -> None:
        super().__init__()
        self.size, self.backend, self.momentum = size, backend, 0.99925
        self.encoder, self.predictor = Encoder(size), Predictor(size)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def _finish(self, loss: Tensor) -> Tensor:
        for parameter in (*self.encoder.parameters(), *self.predictor.parameters()):
            parameter.grad = None
        loss.backward()
        return loss.detach()

    # ------------------------------------------------------------------------------------- fused

    def fused(self, video: Tensor, masks: Masks) -> Tensor:
        loss = self._finish(self.fused_loss(video, masks))
        vk.ema_update_(
            list(self.teacher.parameters()),
            list(self.encoder.parameters()),
            self.momentum,
            backend=self.backend,
        )
        return loss

    def fused_loss(self, video: Tensor, masks: Masks) -> Tensor:
        backend, grid = self.backend, self.size.grid
        whole = vk.Rope3d(grid)

        def attend(rope: vk.Rope3d, mask: Any) -> Callable[[vk.MaskedAttention, Tensor], Tensor]:
            return lambda module, x: module(x, mask=mask, rope=rope)

        with torch.no_grad():
            teacher = self.teacher.transformer(self.teacher.embed(video), attend(whole, None))
        device = video.device
        context, target = (torch.cat(part).to(device) for part in (masks.context, masks.target))
        context_offsets, target_offsets = _offsets(masks.context), _offsets(masks.target)
        tokens = vk.gather_tokens(
            self.encoder.embed(video), context, offsets=context_offsets, backend=backend
        )
        seen = attend(vk.Rope3d(grid, context), vk.Ragged(context_offsets))
        encoded = self.encoder.transformer(tokens, seen)
        sequence = vk.assemble_tokens(
            self.predictor.embed(encoded),
            context,
            self.predictor.mask_token,
            target,
            context_offsets=context_offsets,
            target_offsets=target_offsets,
            backend=backend,
        )
        both = vk.Ragged(context_offsets + target_offsets)
        places = vk.Rope3d(grid, sequence.index)
        predicted = self.predictor.transformer(sequence.tokens, attend(places, both))
        predicted = self.predictor.proj(sequence.targets(predicted, backend=backend))
        return vk.prediction_loss(
            predicted, teacher, target, kind="l1", offsets=target_offsets, backend=backend
        )

    # ------------------------------------------------------------------------------------- plain

    def plain(self, video: Tensor, masks: Masks) -> Tensor:
        loss = self._finish(self.plain_loss(video, masks))
        with torch.no_grad():
            pairs = zip(self.teacher.parameters(), self.encoder.parameters(), strict=True)
            for target, online in pairs:
                target.mul_(self.momentum).add_(online, alpha=1 - self.momentum)
        return loss

    def plain_loss(self, video: Tensor, masks: Masks) -> Tensor:
        grid, device = self.size.grid, video.device

        def attend(
            places: Tensor, keep: Tensor | None
        ) -> Callable[[vk.MaskedAttention, Tensor], Tensor]:
            return lambda module, x: plain_attention(module, x, places, grid, keep)

        every = torch.arange(self.size.tokens, device=device)[None]
        with torch.no_grad():
            teacher = self.teacher.transformer(self.teacher.embed(video), attend(every, None))
            teacher = F.layer_norm(teacher, teacher.shape[-1:])
        context, context_keep = (part.to(device) for part in padded(masks.context))
        target, target_keep = (part.to(device) for part in padded(masks.target))
        tokens = plain_gather(self.encoder.embed(video), context)
        encoded = self.encoder.transformer(tokens, attend(context, context_keep))
        left = self.predictor.embed(encoded)
        right = self.predictor.mask_token.expand(*target.shape, -1)
        places = torch.cat((context, target), dim=1)
        keep = torch.cat((context_keep, target_keep), dim=1)
        # padding sorts behind every token
        order = places.masked_fill(~keep, self.size.tokens).argsort(dim=1, stable=True)
        sequence = plain_gather(torch.cat((left, right), dim=1), order)
        rule = attend(places.gather(1, order), keep.gather(1, order))
        predicted = self.predictor.transformer(sequence, rule)
        rows = order.argsort(dim=1)[:, context.shape[1] :]
        predicted = self.predictor.proj(plain_gather(predicted, rows))
        difference = (predicted - plain_gather(teacher, target)).abs()
        return difference[target_keep].mean()


def padded(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[B, longest] places, padded with 0, and which of them are tokens."""
    places = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    lengths = torch.tensor([part.numel() for part in parts])
    return places, torch.arange(places.shape[1]) < lengths[:, None]


def plain_gather(x: Tensor, index: Tensor) -> Tensor:
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def plain_rope(x: Tensor, places: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """x: [B, H, T, d] turned by places [B or 1, T], in V-JEPA 2's order."""
    part = 2 * (x.shape[-1] // 3 // 2)
    _, height, width = grid
    axes = (places // (height * width), places // width % height, places % width)
    turned = []
    for axis, position in enumerate(axes):
        z = x[..., axis * part : (axis + 1) * part]
        frequency = 10000 ** (-torch.arange(part // 2, device=x.device) / (part / 2))
        angle = (position[:, None, :, None] * frequency).repeat(1, 1, 1, 2)
        even, odd = z.unflatten(-1, (-1, 2)).unbind(-1)
        partner = torch.stack((-odd, even), dim=-1).flatten(-2)
        turned.append((z * angle.cos() + partner * angle.sin()).to(x.dtype))
    return torch.cat((*turned, x[..., 3 * part :]), dim=-1)


def plain_attention(
    module: vk.MaskedAttention,
    x: Tensor,
    places: Tensor,
    grid: tuple[int, int, int],
    keep: Tensor | None,
) -> Tensor:
    three = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = three.unbind(0)
    q, k = plain_rope(q, places, grid), plain_rope(k, places, grid)
    mask = None if keep is None else keep[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return module.proj(out.transpose(1, 2).flatten(-2))


def plan(
    size: Size,
    batch: int,
    kept: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
) -> Plan:
    step = Step(size, backend).to(device, dtype)
    masks = Masks.tubes(size, batch, kept)
    video = torch.randn(batch, 3, size.frames, size.side, size.side).to(device, dtype)
    steps: dict[str, Callable[[], Any]] = {
        "ours": partial(step.fused, video, masks),
        "plain": partial(step.plain, video, masks),
    }
    skipped = {}
    if device.type == "cuda":
        other = copy.deepcopy(step)
        other.plain_loss = measure.compiled(other.plain_loss)
        steps["compiled"] = partial(other.plain, video, masks)
    else:
        skipped["compiled"] = "takes minutes to compile on two cores"
    name = dispatch.choose("attention", backend, device.type, dtype)
    return Plan(steps, name, 0, 0, compiled=("compiled",), skipped=skipped, shares=True)


LARGE = Size(
    dim=1024, heads=16, depth=24, predictor_dim=384, predictor_heads=12, predictor_depth=12
)
# Context tokens kept of 1568: V-JEPA's two mask settings (short-range, then long-range blocks).
CASES = {
    case.name: case
    for case in (
        Case(
            "tiny/2 mask-B",
            partial(plan, Size(), 2, (111, 303)),
            targets={"cpu": {"plain": 1.0}},
            dtypes={"cpu": ("float32",)},
            quick=True,
        ),
        Case(
            "tiny/2 mask-A",
            partial(plan, Size(), 2, (382, 602)),
            targets={"cpu": {"plain": 1.0}},
            dtypes={"cpu": ("float32",)},
        ),
        Case(
            "large/24 mask-B",
            partial(plan, LARGE, 24, (111, 303)),
            targets={"cuda": {"plain": 1.0}},
            dtypes={"cuda": ("bfloat16",)},
            each_backend=False,
        ),
    )
}
