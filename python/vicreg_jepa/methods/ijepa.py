"""I-JEPA (Assran et al., 2023, arXiv:2301.08243): predict an EMA teacher's embeddings of four
blocks of an image from the encoder's embeddings of one large block, with smooth L1 on layer-normed
targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vicreg_jepa.methods import networks
from vicreg_jepa.methods.base import MethodKind, register
from vicreg_jepa.methods.token_prediction import PREDICTOR, Draw, Predictive
from vicreg_jepa.models import masks
from vicreg_jepa.models.vit import Predictor, ViT
from vicreg_jepa.ops.choose import Kernels
from vicreg_jepa.ops.encode import encode

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config


class IJEPA(Predictive):
    """encoder, predictor: with sine position tables. The teacher's momentum rises linearly to 1 in
    `steps` updates.
    """

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
        static_token_share: float = 1.0,
        vc_weight: float = 0.0,
    ) -> None:
        super().__init__(
            encoder,
            predictor,
            kernels,
            draw,
            static_token_share=static_token_share,
            vc_weight=vc_weight,
        )
        self.teacher = kernels.teacher(encoder, momentum, steps)

    @torch.no_grad()
    def targets(self, x: Tensor) -> Tensor:
        """The teacher's tokens."""
        return encode(self.teacher.module, self.kernels, x, None)

    def after_step(self) -> None:
        self.teacher.update(self.encoder)

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens of the teacher, which the published code probes."""
        return self.targets(x)

    def exported(self) -> tuple[str, nn.Module]:
        return "teacher", self.teacher.module


def teacher_settings(config: Config) -> dict[str, Any]:
    return {"momentum": config.optimizer.momentum, "steps": config.training.steps}


def build(config: Config, kernels: Kernels, channels: int) -> IJEPA:
    encoder, predictor = networks.encoder_and_predictor(config, channels, video=False)
    return IJEPA(encoder, predictor, kernels, **teacher_settings(config))


SETTINGS = (*PREDICTOR, "optimizer.momentum")
register(MethodKind("ijepa", IJEPA, build, "tokens", "images", SETTINGS))
