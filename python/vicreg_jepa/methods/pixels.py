"""Frame by frame prediction of pixels (causal.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

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

    predictor: its output is a tubelet, channels x frames x height x width.
    """

    normalise = False

    @torch.no_grad()
    def targets(self, x: Tensor) -> Tensor:
        """The pixels of the tubelets, scaled as the encoder's input."""
        return self.encoder.patch_embed.pixels(x)

    def present(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.encoder.patch_embed.pixels(x)

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens of the encoder."""
        return encode(self.encoder, self.kernels, x, None)


def build(config: Config, kernels: Kernels, channels: int) -> Pixels:
    encoder, predictor = networks.encoder_and_predictor(
        config, channels, video=True, causal=True, pixels=True
    )
    return Pixels(encoder, predictor, kernels, following, **video_loss(config))


SETTINGS = (*PREDICTOR, *OF_VIDEO)
register(MethodKind("pixels", Pixels, build, "tokens", "videos", SETTINGS, check))
