"""V-JEPA's task in pixels: predict the hidden tubelets themselves. What surprise in embeddings is
measured against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jepa.kernels import encode
from jepa.methods.predictive import Predictive
from jepa.vit import spread


class Pixels(Predictive):
    """predictor: its output is a tubelet, channels x frames x height x width."""

    normalise = False

    @torch.no_grad()
    def targets(self, x: Tensor) -> Tensor:
        """The tubelets' pixels, as the encoder takes them."""
        return self.encoder.patch_embed.patches(spread(x))

    def features(self, x: Tensor) -> Tensor:
        """[B, D]: the encoder's tokens, averaged."""
        return encode(self.encoder, self.kernels, x, None).mean(dim=1)
