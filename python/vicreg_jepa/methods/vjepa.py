"""V-JEPA (Bardes et al., 2024, arXiv:2404.08471; 2: Assran et al., 2025, arXiv:2506.09985): predict
an EMA teacher's embeddings of tubes that are hidden from a clip, with L1 on layer-normed targets
and rotary position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vicreg_jepa.methods import networks
from vicreg_jepa.methods.base import MethodKind, register
from vicreg_jepa.methods.ijepa import IJEPA, teacher_settings
from vicreg_jepa.methods.token_prediction import OF_VIDEO, PREDICTOR, video_loss
from vicreg_jepa.models.masks import VideoMasks
from vicreg_jepa.ops.choose import Kernels

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config


class VJEPA(IJEPA):
    """encoder, predictor: with rotary position; draw: `masks.VideoMasks`."""

    kind = "l1"


def check(config: Config) -> None:
    frames, (least, most) = config.data.frames // config.model.tubelet, config.loss.frames_seen
    if config.loss.future and not least <= most < frames:
        raise ValueError(
            f"loss.frames_seen: got {(least, most)}, takes least and most below the clip's "
            f"{frames} token frames"
        )


def build(config: Config, kernels: Kernels, channels: int) -> VJEPA:
    encoder, predictor = networks.encoder_and_predictor(config, channels, video=True)
    draw = VideoMasks(future=config.loss.future, frames_seen=config.loss.frames_seen)
    settings = {**teacher_settings(config), **video_loss(config)}
    return VJEPA(encoder, predictor, kernels, draw, **settings)


SETTINGS = (*PREDICTOR, *OF_VIDEO, "optimizer.momentum", "loss.future", "loss.frames_seen")
register(MethodKind("vjepa", VJEPA, build, "tokens", "videos", SETTINGS, check))
