"""I-JEPA (Assran et al., 2023, arXiv:2301.08243): predict the teacher's embeddings of four blocks
of an image from those of one large block, smooth L1 on layer-normed targets, an EMA teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa import masks
from jepa.kernels import Kernels, encode, predict
from jepa.vit import Predictor, ViT


class IJEPA(nn.Module):
    """encoder, predictor: with sine tables. momentum rises linearly to 1 in `steps` updates."""

    kind = "smooth_l1"

    def __init__(
        self,
        encoder: ViT,
        predictor: Predictor,
        kernels: Kernels,
        *,
        momentum: float = 0.996,
        steps: int = 1000,
        context: masks.Blocks = masks.Blocks(1, (0.85, 1.0)),  # noqa: B008 - frozen
        target: masks.Blocks = masks.Blocks(4, (0.15, 0.2), (0.75, 1.5)),  # noqa: B008
    ) -> None:
        super().__init__()
        self.encoder, self.predictor, self.kernels = encoder, predictor, kernels
        self.teacher = kernels.teacher(encoder, momentum, steps)
        self.context, self.target = context, target

    def draw(self, batch: int, generator: torch.Generator) -> masks.Masks:
        """Of a step's whole batch; generator: a CPU one."""
        return masks.multi_block(self.encoder.grid, batch, generator, self.context, self.target)

    def forward(self, images: Tensor, drawn: masks.Masks) -> Tensor:
        """images [B, C, H, W] -> the loss, the mean over what drawn has them predict."""
        with torch.no_grad():
            teacher = encode(self.teacher.module, self.kernels, images, None)
        context = encode(self.encoder, self.kernels, images, drawn.context)
        predicted = predict(self.predictor, self.kernels, context, drawn)
        return self.kernels.prediction_loss(predicted, teacher, drawn.targets, self.kind)

    def after_step(self) -> None:
        self.teacher.update(self.encoder)

    def features(self, images: Tensor) -> Tensor:
        """[B, D]: the teacher's tokens, averaged, as published for probing."""
        return encode(self.teacher.module, self.kernels, images, None).mean(dim=1)
