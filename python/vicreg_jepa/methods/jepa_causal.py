"""Frame by frame prediction of the encoder's own embeddings (causal.py), without a teacher.

VICReg's variance and covariance of the tokens (Bardes, Ponce and LeCun, 2022, arXiv:2105.04906) or
SIGReg (Balestriero and LeCun, 2025, arXiv:2511.08544) keeps them from collapsing.

The gradient of the prediction's error also goes through the target, so the encoder is taught to
leave out what cannot be predicted; a teacher's embeddings learn it only through the inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vicreg_jepa.methods import networks
from vicreg_jepa.methods.base import MethodKind, register
from vicreg_jepa.methods.causal import Causal, check
from vicreg_jepa.methods.token_prediction import OF_VIDEO, PREDICTOR, video_loss
from vicreg_jepa.models import masks
from vicreg_jepa.ops.choose import Kernels
from vicreg_jepa.ops.encode import encode

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config


class CausalJEPA(Causal):
    """loss = mse(predicted, next tokens) + vc_weight (variance + covariance / 25) + sigreg SIGReg,
    the last two of all tokens but the last frame's. `step` counts the calls of the loss; SIGReg's
    random directions depend on it.
    """

    step: Tensor

    def __init__(self, *args: Any, sigreg: float, slices: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.sigreg, self.slices = sigreg, slices
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens of the encoder."""
        return encode(self.encoder, self.kernels, x, None)

    @torch.no_grad()
    def targets(self, x: Tensor) -> Tensor:
        return self.tokens(x)

    def present(self, x: Tensor, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:])

    def forward(
        self, x: Tensor, drawn: masks.Masks, weight: float = 1.0, process_group: Any = None
    ) -> Tensor:
        tokens = self.tokens(x)
        plane = self.encoder.grid.frame.tokens
        seen = tokens[:, :-plane]
        following = self.following(self.states(seen), F.layer_norm(seen, seen.shape[-1:]))
        (places,) = drawn.targets
        rows = self.kernels.rows
        predicted = rows(self.kernels.take(following, [p - plane for p in places]))
        targets = rows(self.kernels.take(tokens, places))
        loss = weight * F.mse_loss(predicted, F.layer_norm(targets, targets.shape[-1:]))
        every = seen.flatten(0, 1)
        loss = loss + self.variance_covariance(every, process_group)
        if self.sigreg:
            regular = self.kernels.sigreg(every[None], self.slices, int(self.step), process_group)
            loss = loss + self.sigreg * regular
        return loss

    def after_step(self) -> None:
        self.step += 1


def build(config: Config, kernels: Kernels, channels: int) -> CausalJEPA:
    encoder, predictor = networks.encoder_and_predictor(config, channels, video=True, causal=True)
    loss = config.loss
    settings = {**video_loss(config), "sigreg": loss.sigreg, "slices": loss.slices}
    return CausalJEPA(encoder, predictor, kernels, masks.following, **settings)


def check_terms(config: Config) -> None:
    """One of the two terms must keep the tokens from collapsing."""
    check(config)
    if config.loss.vc_weight == 0 and config.loss.sigreg == 0:
        raise ValueError(
            f"loss.vc_weight: got 0 with loss.sigreg 0, {config.method} takes one of them above 0"
        )


SETTINGS = (*PREDICTOR, *OF_VIDEO, "loss.sigreg", "loss.slices")
register(MethodKind("jepa_causal", CausalJEPA, build, "tokens", "videos", SETTINGS, check_terms))
