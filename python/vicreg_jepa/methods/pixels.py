"""Frame by frame prediction of pixels (causal.py)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vicreg_jepa.methods import networks
from vicreg_jepa.methods.base import MethodKind, register
from vicreg_jepa.methods.causal import Causal, check
from vicreg_jepa.methods.token_prediction import OF_VIDEO, PREDICTOR, video_loss
from vicreg_jepa.models.masks import following
from vicreg_jepa.ops.choose import Kernels
from vicreg_jepa.ops.encode import encode

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config


class Pixels(Causal):
    """The same task and network size with pixels as targets, as a baseline for surprise in
    embeddings.

    predictor: its output is a tubelet, channels x frames x height x width. blur: the standard
    deviation in pixels of a Gaussian filter before all else; what it leaves is seen and predicted.
    """

    normalise = False

    def __init__(self, *args: Any, blur: float = 0.0, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.blur = blur

    def filtered(self, x: Tensor) -> Tensor:
        return blurred(x, self.blur)

    @torch.no_grad()
    def targets(self, x: Tensor) -> Tensor:
        """The pixels of the tubelets, scaled as the encoder's input."""
        return self.encoder.patch_embed.pixels(self.filtered(x))

    def present(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.encoder.patch_embed.pixels(x)

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens of the encoder."""
        return encode(self.encoder, self.kernels, self.filtered(x), None)


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Filter each frame of clips [B, C, F, H, W] by a Gaussian of standard deviation `sigma`, in
    pixels, to three of them on either side; beyond its edge a frame goes on as at the edge.
    """
    if sigma == 0:
        return x
    reach = math.ceil(3 * sigma)
    places = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-(places**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    frames = x.transpose(1, 2).flatten(0, 2).unsqueeze(1)  # [B F C, 1, H, W]
    frames = F.pad(frames, (reach,) * 4, mode="replicate")
    frames = F.conv2d(F.conv2d(frames, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return frames.view(len(x), x.shape[2], x.shape[1], *x.shape[3:]).transpose(1, 2)


def build(config: Config, kernels: Kernels, channels: int) -> Pixels:
    encoder, predictor = networks.encoder_and_predictor(
        config, channels, video=True, causal=True, pixels=True
    )
    settings = {**video_loss(config), "blur": config.model.blur}
    return Pixels(encoder, predictor, kernels, following, **settings)


SETTINGS = (*PREDICTOR, *OF_VIDEO, "model.blur")
register(MethodKind("pixels", Pixels, build, "tokens", "videos", SETTINGS, check))
