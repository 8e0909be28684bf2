"""An autoregressive world model of pixels: the next frame from a frame and an action, by the
squared error of pixels. It is the control of the method `world`, with as many parameters.

A frame is encoded as in `world`; the change of each pixel is decoded from the hidden layer and the
action, and added to the frame. In a rollout each predicted frame is encoded again.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vicreg_jepa.methods.base import MethodKind, register
from vicreg_jepa.models.dynamics import still
from vicreg_jepa.models.frames import ConvFrames
from vicreg_jepa.models.perceptron import mlp
from vicreg_jepa.ops.choose import Kernels

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config


class PixelDecoder(nn.Module):
    """[N, features] -> the change of frames, [N, C, size, size]: a linear layer to a map of a
    sixteenth of the edge, then 3 x 3 convolutions, each after doubling the map.
    """

    def __init__(self, features: int, channels: int, size: int, dim: int) -> None:
        super().__init__()
        self.size, edge = size, size
        extents = [size]
        for _ in range(4):
            edge = (edge + 1) // 2
            extents.append(edge)
        self.extents, self.dim = extents[-2::-1], dim
        self.first, self.edge = nn.Linear(features, dim * edge * edge), edge
        widths = (dim, dim, dim // 2, dim // 4, channels)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inward, outward, 3, padding=1) for inward, outward in pairwise(widths)
        )
        still(self.convolutions[-1])

    def forward(self, features: Tensor) -> Tensor:
        x = self.first(features).unflatten(1, (self.dim, self.edge, self.edge))
        for extent, convolution in zip(self.extents, self.convolutions, strict=True):
            x = convolution(F.interpolate(F.gelu(x), size=(extent, extent)))
        return x


class WorldPixels(nn.Module):
    """encoder: frames -> features, as in `world`. A latent is a frame: float [C * H * W] in [0, 1].

    unroll: the steps of an unrolled prediction. actions: A.
    """

    def __init__(
        self,
        encoder: ConvFrames,
        action_encoder: nn.Module,
        middle: nn.Module,
        decoder: PixelDecoder,
        *,
        channels: int,
        actions: int,
        unroll: int,
    ) -> None:
        super().__init__()
        self.encoder, self.action_encoder = encoder, action_encoder
        self.middle, self.decoder = middle, decoder
        self.shape, self.actions, self.steps = (
            (channels, decoder.size, decoder.size),
            actions,
            unroll,
        )

    def prepare(self, frames: Tensor) -> None:
        """Set the mean and the deviation of each channel of frames uint8 [N, H, W, C]."""
        self.encoder.measure(self.encode(frames).unflatten(1, self.shape))

    def encode(self, frames: Tensor) -> Tensor:
        """float32 [B, C * H * W] of frames uint8 [B, H, W, C]. Raises ValueError for another
        dtype.
        """
        if frames.dtype != torch.uint8:
            raise ValueError(f"frames: got {frames.dtype}, takes torch.uint8, 0 to 255")
        return (frames.movedim(-1, 1).float() / 255.0).flatten(1)

    def following(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        """The next frames [N, C * H * W] of frames, after embedded actions [N, E]."""
        features = self.encoder.features(pixels.unflatten(1, self.shape))
        change = self.decoder(self.middle(torch.cat((features, embedded), dim=1)))
        return pixels + (self.encoder.deviation * change).flatten(1)

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        """Predicted frames [B, K, H, D] after frames `start` [B, D], for K candidate sequences of H
        actions, [B, K, H, A].
        """
        batch, candidates, steps = actions.shape[:3]
        pixels = start[:, None].expand(-1, candidates, -1).flatten(0, 1)
        embedded, path = self.action_encoder(actions.flatten(0, 1)), []
        for step in range(steps):
            pixels = self.following(pixels, embedded[:, step]).clamp(0, 1)
            path.append(pixels)
        return torch.stack(path, dim=1).unflatten(0, (batch, candidates))

    def forward(self, frames: Tensor, actions: Tensor, process_group: Any = None) -> Tensor:
        """The squared error of `unroll` predicted frames of windows, in units of the channels'
        deviations. frames uint8 [B, T + 1, H, W, C], actions float [B, T, A].
        """
        wanted = self.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        embedded, pixels, errors = self.action_encoder(actions), wanted[:, 0], []
        for step in range(self.steps):
            pixels = self.following(pixels, embedded[:, step])
            off = (pixels - wanted[:, step + 1]).unflatten(1, self.shape) / self.encoder.deviation
            errors.append(off.float().square().mean())
        return torch.stack(errors).mean()

    def after_step(self) -> None:
        """Does nothing: there is no teacher."""

    def features(self, frames: Tensor) -> Tensor:
        """[B, features] of frames uint8 [B, H, W, C], the input of a probe."""
        return self.encoder.features(self.encode(frames).unflatten(1, self.shape))

    def exported(self) -> tuple[str, nn.Module]:
        return "encoder", self.encoder


def build(config: Config, kernels: Kernels, channels: int) -> WorldPixels:
    model, data = config.model, config.data
    points = model.keypoints, model.sharpness, model.keypoint_map
    encoder = ConvFrames(channels, data.size, model.dim, 1, *points)
    width = encoder.head.in_features
    encoder.head = nn.Identity()  # the decoder reads the features
    embed = mlp(data.actions, model.action_dim, model.action_dim)
    middle = mlp(width + model.action_dim, model.predictor_dim, model.predictor_dim)
    decoder = PixelDecoder(model.predictor_dim, channels, data.size, model.dim)
    return WorldPixels(
        encoder, embed, middle, decoder, channels=channels, actions=data.actions,
        unroll=config.loss.unroll,
    )  # fmt: skip


def check(config: Config) -> None:
    """Check the settings that must fit together."""
    if config.model.encoder != "conv":
        raise ValueError(f"model.encoder: got {config.model.encoder!r}, world_pixels takes 'conv'")
    if config.backend is not None:
        raise ValueError(
            f"backend: got {config.backend!r}, world_pixels takes none: it has no fused op"
        )
    if config.loss.unroll > config.data.window:
        raise ValueError(
            f"loss.unroll: got {config.loss.unroll}, takes at most data.window, "
            f"{config.data.window} actions"
        )


SETTINGS = (
    "loss.unroll",
    "model.keypoints",
    "model.sharpness",
    "model.keypoint_map",
    "model.action_dim",
    "model.predictor_dim",
)
register(
    MethodKind("world_pixels", WorldPixels, build, "trajectories", "trajectories", SETTINGS, check)
)
