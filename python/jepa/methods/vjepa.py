"""V-JEPA (Bardes et al., 2024, arXiv:2404.08471; 2: Assran et al., 2025, arXiv:2506.09985): predict
the teacher's embeddings of tubes hidden from a clip, L1 on layer-normed targets, rotary position.
"""

from __future__ import annotations

import torch

from jepa import masks
from jepa.kernels import Kernels
from jepa.methods.ijepa import IJEPA
from jepa.vit import Predictor, ViT


class VJEPA(IJEPA):
    """encoder, predictor: with rotary position.

    blocks: the settings of tube masks, one drawn a step (published: 8 short-range blocks of 15 %
    and 2 long-range ones of 70 %). future: the chance that a step hides the future instead: all
    tubes after a number of token frames in `frames_seen`, the task that surprise is measured on.
    """

    kind = "l1"

    def __init__(
        self,
        encoder: ViT,
        predictor: Predictor,
        kernels: Kernels,
        *,
        momentum: float = 0.998,
        steps: int = 1000,
        blocks: tuple[masks.Blocks, ...] = (
            masks.Blocks(8, (0.15, 0.15), (0.75, 1.5)),
            masks.Blocks(2, (0.7, 0.7), (0.75, 1.5)),
        ),
        future: float = 0.0,
        frames_seen: tuple[int, int] = (1, 5),
    ) -> None:
        super().__init__(encoder, predictor, kernels, momentum=momentum, steps=steps)
        self.blocks, self.future, self.frames_seen = blocks, future, frames_seen

    def draw(self, batch: int, generator: torch.Generator) -> masks.Masks:
        grid = self.encoder.grid
        if self.future > 0 and float(torch.rand((), generator=generator)) < self.future:
            least, most = self.frames_seen
            seen = int(torch.randint(least, most + 1, (), generator=generator))
            return masks.future(grid, batch, seen)
        which = int(torch.randint(len(self.blocks), (), generator=generator))
        return masks.tubes(grid, batch, generator, self.blocks[which])
