"""A probe that finds the tokens that matter: attention with learned queries, and a perceptron.

Ridge regression of all tokens of a frame has a weight for each number of each token, so it needs
more videos than there are such numbers. This probe reads every token with the same weights. Each
of its queries gives every token of a frame a weight that sums to 1, and takes the means of what the
tokens hold and of their places. The place is then known to a fraction of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vicreg_jepa.models.fitting import fit
from vicreg_jepa.models.perceptron import mlp

WIDTH, QUERIES, VALUES, HIDDEN = 64, 4, 16, 128
STEPS, BATCH, RATE, DECAY = 3000, 64, 2e-3, 0.01


class TokenProbe(nn.Module):
    """Tokens [B, frames, T, D] of square frames -> [B, outputs]. Raises ValueError if T is no
    square.
    """

    places: Tensor

    def __init__(self, frames: int, tokens: int, width: int, outputs: int) -> None:
        super().__init__()
        edge = round(tokens**0.5)
        if edge * edge != tokens:
            raise ValueError(f"tokens: got {tokens} a frame, takes a square number")
        line = torch.linspace(-1, 1, edge)
        self.register_buffer("places", torch.cartesian_prod(line, line))  # [T, 2]
        self.embed = nn.Linear(width, WIDTH)
        self.queries, self.values = nn.Linear(WIDTH, QUERIES), nn.Linear(WIDTH, VALUES)
        self.read = mlp(frames * QUERIES * (VALUES + 2), HIDDEN, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        h = nn.functional.gelu(self.embed(tokens))
        weights = self.queries(h).softmax(dim=2).transpose(2, 3)  # [B, frames, queries, T]
        held = torch.cat((self.values(h), self.places.expand(*h.shape[:2], -1, -1)), dim=-1)
        return self.read((weights @ held).flatten(1))


def predicted(seen: Tensor, goal: Tensor, test: Tensor, seed: int) -> Tensor:
    """Fit the probe to tokens [N, frames, T, D] and goals [N, K] by AdamW with a cosine schedule,
    and predict [M, K] for the tokens `test`. All tokens are scaled by one factor, each goal by its
    own.
    """
    middle, spread = seen.mean(dim=(0, 1, 2)), seen.std().clamp_min(1e-12)
    mean, scale = goal.mean(dim=0), goal.std(dim=0).clamp_min(1e-12)
    aim = ((goal - mean) / scale).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        frames, count, width = seen.shape[1:]
        probe = TokenProbe(frames, count, width, goal.shape[1])

    def loss(rows: Tensor) -> Tensor:
        return nn.functional.mse_loss(probe((seen[rows] - middle) / spread), aim[rows])

    fit(
        probe, loss, len(seen), steps=STEPS, batch=BATCH, rate=RATE, decay=DECAY,
        generator=generator,
    )  # fmt: skip
    with torch.no_grad():
        guesses = torch.cat([probe((part - middle) / spread) for part in test.split(256)])
    return guesses * scale + mean
