"""I-JEPA (Assran et al., 2023, arXiv:2301.08243): predict the teacher's embeddings of four blocks
of an image from those of one large block, smooth L1 on layer-normed targets, an EMA teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_jepa.methods.token_prediction import Draw, Predictive
from vicreg_jepa.models import masks
from vicreg_jepa.models.vit import Predictor, ViT
from vicreg_jepa.ops.choose import Kernels
from vicreg_jepa.ops.encode import encode


class IJEPA(Predictive):
    """encoder, predictor: with sine tables. momentum rises linearly to 1 in `steps` updates."""

    kind = "smooth_l1"

    def __init__(
        self,
        encoder: ViT,
        predictor: Predictor,
        kernels: Kernels,
        draw: Draw = masks.multi_block,
        *,
        momentum: float = 0.996,
        steps: int = 1000,
        still: float = 1.0,
        spread: float = 0.0,
    ) -> None:
        super().__init__(encoder, predictor, kernels, draw, still=still, spread=spread)
        self.teacher = kernels.teacher(encoder, momentum, steps)

    @torch.no_grad()
    def targets(self, x: Tensor) -> Tensor:
        """The teacher's tokens."""
        return encode(self.teacher.module, self.kernels, x, None)

    def after_step(self) -> None:
        self.teacher.update(self.encoder)

    def tokens(self, x: Tensor) -> Tensor:
        """The teacher's, as published for probing."""
        return self.targets(x)
