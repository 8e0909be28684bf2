"""Vision transformers for images and video, with timm's parameter names.

A transformer gets its attention as the argument `attend`, so it works on padded [B, T, D] and on
packed [total, D] tokens (`ops/`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vicreg_kernels as vk

# Pixels in [0, 1] are scaled to (x - CENTRE) / SCALE before the projection of patches.
CENTRE, SCALE = 0.5, 0.25

# (attention module, its normed input) -> its output
Attend = Callable[[vk.MaskedAttention, Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """The grid of a clip's tokens: frames x height x width; an image has one frame."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def frame(self) -> Grid:
        """The grid of one frame."""
        return Grid(1, self.height, self.width)

    @property
    def axes(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = vk.MaskedAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + attend(self.attn, self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Local(nn.Module):
    """Adds a 3 x 3 convolution over a token's frame and the one before it. A moving thing comes
    from a neighbouring token, and attention learns this only after long training. Takes [B, T, dim]
    of whole frames.
    """

    def __init__(self, dim: int, frame: Grid) -> None:
        super().__init__()
        self.frame, self.conv = frame, nn.Conv3d(dim, dim, (2, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).unflatten(2, (-1, self.frame.height, self.frame.width))
        before = nn.functional.pad(frames, (0, 0, 0, 0, 1, 0))  # none before the first
        return x + self.conv(before).flatten(2).transpose(1, 2)


class Transformer(nn.Module):
    """Blocks and a last norm; local: convolutions, one before each block; checkpointing: recompute
    each block in the backward.
    """

    def __init__(self, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.local = nn.ModuleList()
        self.checkpointing = False

    def run(self, x: Tensor, attend: Attend) -> Tensor:
        for i, block in enumerate(self.blocks):
            if self.local:
                x = self.local[i](x)
            if self.checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, attend, use_reentrant=False)
            else:
                x = block(x, attend)
        return self.norm(x)


class PatchEmbed(nn.Module):
    """[B, C, frames, height, width] -> [B, T, dim], for tubelets of `size`; an image has one
    frame.
    """

    def __init__(self, channels: int, size: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        self.size = size
        self.proj = nn.Conv3d(channels, dim, size, stride=size)

    def patches(self, x: Tensor) -> Tensor:
        """[B, T, pixels of a patch]."""
        batch, channels, frames, height, width = x.shape
        t, h, w = self.size
        x = x.reshape(batch, channels, frames // t, t, height // h, h, width // w, w)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def pixels(self, x: Tensor) -> Tensor:
        """The patches, scaled for the projection: pixels in [0, 1] become centred about 0, with a
        scale at which a patch weighs as much as its position.
        """
        return (self.patches(x) - CENTRE) / SCALE

    def forward(self, x: Tensor) -> Tensor:
        x = self.pixels(x)  # as a product: it equals the convolution
        return nn.functional.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class ViT(Transformer):
    """The encoder: patches, positions (a fixed sine table, or rotary in the attention), blocks.

    image: (channels, frames, height, width) of its input; patch: the tubelet (1 frame for images).
    position: "sincos" adds a table, "rope" leaves position to `attend`. sees: "clip", tokens attend
    to the whole clip; "frame", each token frame is encoded by itself (V-JEPA 2-AC), so that a
    frame's embeddings do not depend on what happens before and after it.
    """

    def __init__(
        self,
        image: tuple[int, int, int, int],
        patch: tuple[int, int, int],
        dim: int,
        depth: int,
        heads: int,
        position: str = "sincos",
        sees: str = "clip",
    ) -> None:
        super().__init__(dim, heads, depth)
        channels, *extent = image
        if any(a % b for a, b in zip(extent, patch, strict=True)):
            raise ValueError(f"patch: got {patch} for {tuple(extent)}, takes a divisor of each")
        if position not in ("sincos", "rope"):
            raise ValueError(f"position: got {position!r}, takes 'sincos' or 'rope'")
        self.grid = Grid(*(a // b for a, b in zip(extent, patch, strict=True)))
        if sees not in ("clip", "frame"):
            raise ValueError(f"sees: got {sees!r}, takes 'clip' or 'frame'")
        self.features, self.position, self.sees = dim, position, sees
        self.patch_embed = PatchEmbed(channels, patch, dim)
        table = sincos(self.grid, dim) if position == "sincos" else torch.zeros(0)
        self.register_buffer("pos_embed", table, persistent=False)
        initialise(self)

    @property
    def rope(self) -> Grid | None:
        return self.grid if self.position == "rope" else None

    @property
    def apart(self) -> Grid | None:
        """The grid if its frames do not see each other, else None."""
        return self.grid if self.sees == "frame" else None

    def embed(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] or clips [B, C, F, H, W] -> positioned tokens [B, T, dim]."""
        x = self.patch_embed(x.unsqueeze(2) if x.dim() == 4 else x)
        return x + self.pos_embed if self.position == "sincos" else x


class Predictor(Transformer):
    """A narrower transformer that predicts the embeddings of target tokens from context tokens and
    a mask token.

    features: width of the context's tokens; targets: width of the predictions, by default the same.
    position: as for the encoder, or "both". local: a convolution before each block, for dense
    frames.
    """

    def __init__(
        self,
        grid: Grid,
        features: int,
        dim: int,
        depth: int,
        heads: int,
        position: str = "sincos",
        targets: int | None = None,
        local: bool = False,
    ) -> None:
        super().__init__(dim, heads, depth)
        if local:
            self.local.extend(Local(dim, grid.frame) for _ in range(depth))
        self.grid, self.position = grid, position
        self.predictor_embed = nn.Linear(features, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.predictor_proj = nn.Linear(dim, targets or features)
        table = torch.zeros(0) if position == "rope" else sincos(grid, dim)
        self.register_buffer("pos_embed", table, persistent=False)
        initialise(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    @property
    def rope(self) -> Grid | None:
        return self.grid if self.position in ("rope", "both") else None

    @property
    def table(self) -> Tensor | None:
        return self.pos_embed if self.position in ("sincos", "both") else None


def sincos(grid: Grid, dim: int) -> Tensor:
    """[T, dim]: sines and cosines of the coordinates; each axis has its own part of the columns."""
    axes = [n for n in grid.axes if n > 1] or [1]
    part = dim // len(axes) // 2 * 2
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in axes))
    places = places.reshape(grid.tokens, len(axes))
    frequency = 10000.0 ** -(torch.arange(part // 2, dtype=torch.float64) / (part / 2))
    angles = places[:, :, None] * frequency
    table = torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1)
    return nn.functional.pad(table, (0, dim - table.shape[1])).float()


def initialise(module: nn.Module) -> None:
    """Set truncated normal weights of standard deviation 1 / sqrt(inputs) and zero biases; the
    weights that write to the residual stream shrink with depth, as in I-JEPA and V-JEPA. At their
    width the published 0.02 is about 1 / sqrt(inputs); a narrow model learns several times more
    slowly from 0.02.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv3d):
            nn.init.trunc_normal_(child.weight, std=child.weight[0].numel() ** -0.5)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    for depth, block in enumerate(getattr(module, "blocks", ()), start=1):
        block.attn.proj.weight.data.div_((2 * depth) ** 0.5)
        block.mlp.fc2.weight.data.div_((2 * depth) ** 0.5)
