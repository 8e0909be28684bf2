"""Encoders of single frames: images float [N, C, H, W] in [0, 1] -> latents [N, D].

Both keep the places of features: a linear layer reads the whole map of features, without a mean
over positions, because a world model must know where things are.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from vicreg_jepa.models.vit import Attend, ViT

KEYPOINT_MAP = 2
SHARPNESS = 3.0
HIDDEN = 256  # the width of the hidden layer of ConvFrames


class Frames(nn.Module):
    """The base class. The channels are normalised by a mean and a deviation that `measure` sets,
    and that are part of the network's state.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("deviation", torch.ones(channels, 1, 1))

    @torch.no_grad()
    def measure(self, frames: Tensor) -> None:
        """Set the mean and the deviation of each channel to those of frames [N, C, H, W]."""
        self.mean.copy_(frames.mean(dim=(0, 2, 3))[:, None, None])
        spread = frames.transpose(0, 1).flatten(1).std(dim=1)
        self.deviation.copy_(torch.where(spread > 0, spread, 1.0)[:, None, None])

    def normalised(self, frames: Tensor) -> Tensor:
        return (frames - self.mean) / self.deviation


class ConvFrames(Frames):
    """3 x 3 convolutions of stride 2 with GELU and without batch norm, a hidden layer of the whole
    last map, and a linear layer.

    size: the edge H = W of a frame, at least 16. dim: the channels of the last maps, at least 4.
    keypoints: a number of points; their coordinates enter the hidden layer and, past it, the linear
    one; 0: none. sharpness: of the points at the beginning. keypoint_map: the
    convolutions, 1 to 4, whose map they are read from.

    torch's default initialisation halves the signal at each convolution, so that training begins
    with the keypoints. With weights that keep the signal's size, the leading components of the
    features are functions of the largest thing alone, a wall, and what is small is learned late.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        dim: int,
        latent: int,
        keypoints: int = 0,
        sharpness: float = SHARPNESS,
        keypoint_map: int = KEYPOINT_MAP,
    ) -> None:
        super().__init__(channels)
        widths = (channels, dim // 4, dim // 2, dim, dim)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inward, outward, 3, stride=2, padding=1)
            for inward, outward in pairwise(widths)
        )
        edge = size
        for _ in self.convolutions:
            edge = (edge + 1) // 2
        self.keypoint_map = keypoint_map
        kept = widths[keypoint_map]
        self.keypoints = Keypoints(kept, keypoints, sharpness) if keypoints else None
        self.hidden = nn.Linear(dim * edge * edge + 2 * keypoints, HIDDEN)
        self.head = nn.Linear(HIDDEN + 2 * keypoints, latent)

    def features(self, frames: Tensor) -> Tensor:
        """The input of the last linear layer, [N, features]."""
        x, points = self.normalised(frames), []
        for depth, convolution in enumerate(self.convolutions, start=1):
            x = nn.functional.gelu(convolution(x))
            if depth == self.keypoint_map and self.keypoints is not None:
                points.append(self.keypoints(x))
        hidden = nn.functional.gelu(self.hidden(torch.cat([x.flatten(1), *points], dim=1)))
        return torch.cat([hidden, *points], dim=1)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.features(frames))


class Keypoints(nn.Module):
    """The spatial softmax: maps [N, channels, H, W] -> the expected coordinates [N, 2 points] of
    `points` distributions over the places of a map, in [-1, 1] (Levine et al., 2016,
    arXiv:1504.00702). sharpness: the factor on their scores.
    """

    def __init__(self, channels: int, points: int, sharpness: float = SHARPNESS) -> None:
        super().__init__()
        self.scores, self.sharpness = nn.Conv2d(channels, points, 3, padding=1), sharpness

    def forward(self, maps: Tensor) -> Tensor:
        scores = self.sharpness * self.scores(maps)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        shares = scores.flatten(2).softmax(dim=-1).view_as(scores)
        height, width = scores.shape[2:]
        x = torch.linspace(-1, 1, width, device=maps.device, dtype=shares.dtype)
        y = torch.linspace(-1, 1, height, device=maps.device, dtype=shares.dtype)
        return torch.cat((shares.sum(dim=2) @ x, shares.sum(dim=3) @ y), dim=1)


class ViTFrames(Frames):
    """A ViT and a linear layer of all its tokens. A frame whose edge is no multiple of the patch
    is enlarged at its right and lower edges, by repeating the last pixels.

    attend: the attention of dense tokens.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        dim: int,
        latent: int,
        *,
        depth: int,
        heads: int,
        patch: int,
        attend: Attend,
    ) -> None:
        super().__init__(channels)
        self.attend, self.missing = attend, -size % patch
        extent = size + self.missing
        self.vit = ViT((channels, 1, extent, extent), (1, patch, patch), dim, depth, heads)
        self.head = nn.Linear(dim * self.vit.grid.tokens, latent)

    def features(self, frames: Tensor) -> Tensor:
        """The input of the last linear layer, [N, features]."""
        frames, missing = self.normalised(frames), (0, self.missing) * 2
        if self.missing:
            frames = nn.functional.pad(frames, missing, mode="replicate")
        return self.vit.run(self.vit.embed(frames), self.attend).flatten(1)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.features(frames))
