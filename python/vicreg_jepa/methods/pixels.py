"""Frame by frame prediction of pixels (causal.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_jepa.methods.causal import Causal
from vicreg_jepa.ops.encode import encode


class Pixels(Causal):
    """The same task and size in pixels: what surprise in embeddings is measured against.

    predictor: its output is a tubelet, channels x frames x height x width.
    """

    normalise = False

    @torch.no_grad()
    def targets(self, x: Tensor) -> Tensor:
        """The tubelets' pixels, as the encoder takes them."""
        return self.encoder.patch_embed.pixels(x)

    def present(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.encoder.patch_embed.pixels(x)

    def tokens(self, x: Tensor) -> Tensor:
        """The encoder's."""
        return encode(self.encoder, self.kernels, x, None)
