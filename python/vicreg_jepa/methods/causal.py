"""Prediction frame by frame: every token frame's next one from it and all before it, in one pass
(V-JEPA 2-AC without actions: Assran et al., 2025, arXiv:2506.09985, section 3).

The encoder sees each frame by itself, so no frame's embedding tells of another one, and what is
foreseen can only come from the predictor's memory. What is predicted is the change from the frame
before: a still world is foreseen from the start.

The loss is squared. V-JEPA's absolute one asks for the median, and of a thing that may be in one of
several places the median says that it is in none: until motion is foreseen to within a token, there
is nothing to be gained by foreseeing it at all, and training stays there.
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
    """encoder: with sees="frame"; predictor: with position="both" and local."""

    kind = "mse"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.predictor.predictor_proj.weight.data.mul_(0.1)  # begins near "nothing changes"
        self.predictor.mask_token.requires_grad_(False)  # no token is masked

    @property
    def contexts(self) -> tuple[int, ...]:
        """In frames; a single token frame has no motion to go on."""
        tubelet = self.encoder.patch_embed.size[0]
        return tuple(n * tubelet for n in range(2, self.encoder.grid.frames))

    @abstractmethod
    def present(self, x: Tensor, tokens: Tensor) -> Tensor:
        """[B, T, D]: what is predicted, of the frames of `tokens`."""

    def following(self, tokens: Tensor, present: Tensor) -> Tensor:
        """[B, T, D]: each frame's next one, of tokens [B, T, features] of whole frames."""
        grid = self.encoder.grid
        h = self.predictor.predictor_embed(F.layer_norm(tokens, tokens.shape[-1:]))
        assert self.predictor.table is not None  # it has position="both"
        h = h + self.predictor.table[: tokens.shape[1]]
        frames = tokens.shape[1] // grid.frame.tokens
        h = self.predictor.run(h, self.kernels.attend_causal(grid, frames))
        return present + self.predictor.predictor_proj(h)

    def _seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of all frames but the last, and what is foreseen after each."""
        seen = x[:, :, : -self.encoder.patch_embed.size[0]]
        tokens = encode(self.encoder, self.kernels, seen, None)
        return tokens, self.following(tokens, self.present(seen, tokens))

    def forward(
        self, x: Tensor, drawn: masks.Masks, weight: float = 1.0, process_group: Any = None
    ) -> Tensor:
        """x [B, C, F, H, W]; the loss as in Predictive."""
        targets = self.targets(x)
        tokens, following = self._seen(x)
        plane = self.encoder.grid.frame.tokens
        predicted = self.kernels.take(following, [p - plane for p in drawn.targets[0]]).x
        loss = weight * self.kernels.prediction_loss(
            predicted, targets, drawn.targets, self.kind, self.normalise
        )
        return loss + self.variance_covariance(tokens.flatten(0, 1), process_group)

    def foreseen(self, x: Tensor, seen: Sequence[int]) -> list[Tensor]:
        """The next token frame after each number of them, [B, plane, D]."""
        _, following = self._seen(x)
        plane = self.encoder.grid.frame.tokens
        return [following[:, (n - 1) * plane : n * plane] for n in seen]


def check(config: Config) -> None:
    """What every method frame by frame takes."""
    if config.model.sees != "frame":
        raise ValueError(f"model.sees: got 'clip', {config.method} takes 'frame'")
    if config.data.frames // config.model.tubelet < 2:
        raise ValueError(
            f"data.frames: got {config.data.frames}, {config.method} takes at least two token "
            f"frames of {config.model.tubelet}"
        )
