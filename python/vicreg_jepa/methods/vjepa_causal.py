"""Frame by frame prediction of a teacher's embeddings (causal.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from vicreg_jepa.methods import networks
from vicreg_jepa.methods.base import MethodKind, register
from vicreg_jepa.methods.causal import Causal, check
from vicreg_jepa.methods.ijepa import IJEPA, teacher_settings
from vicreg_jepa.methods.token_prediction import OF_VIDEO, PREDICTOR, video_loss
from vicreg_jepa.models.masks import following
from vicreg_jepa.ops.choose import Kernels

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config


class CausalVJEPA(Causal, IJEPA):
    """Predicts the teacher's embeddings."""

    kind = "mse"

    def present(self, x: Tensor, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:])


def build(config: Config, kernels: Kernels, channels: int) -> CausalVJEPA:
    encoder, predictor = networks.encoder_and_predictor(config, channels, video=True, causal=True)
    settings = {**teacher_settings(config), **video_loss(config)}
    return CausalVJEPA(encoder, predictor, kernels, following, **settings)


SETTINGS = (*PREDICTOR, *OF_VIDEO, "optimizer.momentum")
register(MethodKind("vjepa_causal", CausalVJEPA, build, "tokens", "videos", SETTINGS, check))
