"""Macro-actions of a world model: a code of a chunk of actions, and the latent after the chunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vicreg_jepa.models.dynamics import FREQUENCY, MLPDynamics
from vicreg_jepa.models.perceptron import mlp


class Macro(nn.Module):
    """A level of a hierarchy: its actions are codes of chunks of 1 to `longest` actions.

    encoder: a chunk, padded with zeros, and which of its places are taken -> a code in (-1, 1).
    predictor: z' = z + f(z, code). inverse: [..., 2 D] of the latents before and after a chunk ->
    its code [..., C]; it teaches the codes what changes latents, and planning does not use it.
    actions: C, the elements of a code.
    """

    def __init__(
        self,
        longest: int,
        actions: int,
        latent: int,
        code: int,
        hidden: int,
        depth: int,
        waves: int = 0,
        frequency: float = FREQUENCY,
    ) -> None:
        super().__init__()
        self.longest, self.actions = longest, code
        self.encoder = mlp(longest * (actions + 1), hidden, hidden, code)
        self.predictor = MLPDynamics(latent, code, hidden, depth, waves, frequency)
        self.inverse = mlp(2 * latent, hidden, code)

    def codes(self, chunks: Tensor, lengths: Tensor) -> Tensor:
        """[N, C] of chunks [N, longest, A], of which the first lengths [N] actions count."""
        taken = torch.arange(self.longest, device=chunks.device) < lengths[:, None]
        seen = torch.cat([chunks * taken[..., None], taken[..., None].to(chunks)], dim=2)
        return torch.tanh(self.encoder(seen.flatten(1)))

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        """Predicted latents [B, K, H, D] after latents [B, D], for codes [B, K, H, C]."""
        batch, candidates = actions.shape[:2]
        starts = start[:, None].expand(-1, candidates, -1).flatten(0, 1)
        path = self.predictor.unroll(starts[:, None], actions.flatten(0, 1))
        return path.unflatten(0, (batch, candidates))
