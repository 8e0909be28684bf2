"""Prediction frame by frame: each token frame is predicted from all frames before it, in one pass
(V-JEPA 2-AC without actions: Assran et al., 2025, arXiv:2506.09985, section 3).

The encoder sees each frame by itself, so a frame's embedding contains nothing of other frames, and
the prediction can only use the predictor's memory of earlier ones. The predictor predicts the
change from the frame before, so a static scene is predicted right from the start.

The loss is squared. V-JEPA's absolute loss leads to the median. If a thing may be in one of several
places, the median has it in none of them. So until the model predicts motion to within a token,
predicting motion does not lower the loss, and training makes no progress.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from vicreg_jepa.methods.token_prediction import Predictive
from vicreg_jepa.models import masks
from vicreg_jepa.ops.encode import encode

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config


class Causal(Predictive):
    """The base class. The encoder has sees="frame", the predictor position="both" and `local`."""

    kind = "mse"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.predictor.predictor_proj.weight.data.mul_(0.1)  # begins near "nothing changes"
        self.predictor.mask_token.requires_grad_(False)  # no token is masked

    @property
    def contexts(self) -> tuple[int, ...]:
        """The context lengths in frames, of two token frames or more: one shows no motion."""
        tubelet = self.encoder.patch_embed.size[0]
        return tuple(n * tubelet for n in range(2, self.encoder.grid.frames))

    @abstractmethod
    def present(self, x: Tensor, tokens: Tensor) -> Tensor:
        """[B, T, D]: the targets at the frames of `tokens`, to which the predicted change is
        added.
        """

    def filtered(self, x: Tensor) -> Tensor:
        """What the method sees of clips [B, C, F, H, W]; by default all."""
        return x

    def states(self, tokens: Tensor) -> Tensor:
        """[B, T, predictor_dim]: the predictor's last states at tokens [B, T, features] of whole
        frames.
        """
        grid = self.encoder.grid
        h = self.predictor.predictor_embed(F.layer_norm(tokens, tokens.shape[-1:]))
        assert self.predictor.table is not None  # it has position="both"
        h = h + self.predictor.table[: tokens.shape[1]]
        frames = tokens.shape[1] // grid.frame.tokens
        return self.predictor.run(h, self.kernels.attend_causal(grid, frames))

    def following(self, states: Tensor, present: Tensor) -> Tensor:
        """[B, T, D]: the prediction of each frame's next one, from the predictor's states."""
        return present + self.predictor.predictor_proj(states)

    def _seen(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of all frames but the last, the predictor's states at them, and the prediction
        of the frame after each.
        """
        seen = self.filtered(x)[:, :, : -self.encoder.patch_embed.size[0]]
        tokens = encode(self.encoder, self.kernels, seen, None)
        states = self.states(tokens)
        return tokens, states, self.following(states, self.present(seen, tokens))

    def forward(
        self, x: Tensor, drawn: masks.Masks, weight: float = 1.0, process_group: Any = None
    ) -> Tensor:
        """x [B, C, F, H, W]; the loss as in Predictive."""
        targets = self.targets(x)
        tokens, _, following = self._seen(x)
        plane = self.encoder.grid.frame.tokens
        predicted = self.kernels.take(following, [p - plane for p in drawn.targets[0]]).x
        loss = weight * self.kernels.prediction_loss(
            predicted, targets, drawn.targets, self.kind, self.normalise
        )
        return loss + self.variance_covariance(tokens.flatten(0, 1), process_group)

    def foreseen(self, x: Tensor, seen: Sequence[int]) -> list[Tensor]:
        """For each number of token frames seen, the prediction of the next one, [B, plane, D]."""
        return [predicted for _, predicted in self.known(x, seen)]

    def known(self, x: Tensor, seen: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """For each number of token frames seen, the predictor's states at the last of them, [B,
        plane, predictor_dim], and the prediction of the next one, [B, plane, D].
        """
        _, states, following = self._seen(x)
        plane = self.encoder.grid.frame.tokens
        ends = [slice((n - 1) * plane, n * plane) for n in seen]
        return [(states[:, end], following[:, end]) for end in ends]


def check(config: Config) -> None:
    """Check the settings that every method of this kind needs."""
    if config.model.sees != "frame":
        raise ValueError(f"model.sees: got 'clip', {config.method} takes 'frame'")
    if config.data.frames // config.model.tubelet < 2:
        raise ValueError(
            f"data.frames: got {config.data.frames}, {config.method} takes at least two token "
            f"frames of {config.model.tubelet}"
        )
