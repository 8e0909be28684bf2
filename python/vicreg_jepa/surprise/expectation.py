"""What is expected of a prediction, fitted to possible videos, so that only what is beyond it
counts as surprise.

What comes out from behind a panel surprises in possible videos too. So the first part is how far
the error of a token is above the error that is expected of such a prediction. The second is about
memory: a possible thing is better predicted from all frames before it than from the last two alone,
and an impossible one, which contradicts what was seen long ago, is worse predicted. So it is how
far this gain is below the gain that is expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vicreg_jepa.methods.causal import Causal
from vicreg_jepa.models.fitting import fit
from vicreg_jepa.models.perceptron import mlp
from vicreg_jepa.physics import possible

FIRST, COUNT = 2 * 10**9, 800  # the seeds of the videos, which no training of a seed uses
TOKENS = 700  # drawn from each video
SHORT = 2  # the frames of the prediction without memory: one shows no motion
WIDTHS = 128, 64  # of the hidden layers, for the error and for the gain
STEPS, BATCH, RATE, DECAY = (3500, 2500), 1024, 2e-3, 0.01
MEMORY = 0.15  # the weight of the second part
LEAST, APART = 1e-3, 0.05  # added to errors and to squared distances of predictions
SPREAD = (-4.0, 3.0)  # the range of the logarithm of the spread


class Evidence(NamedTuple):
    """What is known of the tokens of a predicted frame. features: [B, plane, F], of the predictions
    alone; error, gain: [B, plane].
    """

    features: Tensor
    error: Tensor
    gain: Tensor


class Expectation(nn.Module):
    """features: their number F. One perceptron gives the mean and the logarithm of the spread of
    the logarithm of a token's error; the other the mean of its gain, in units of the buffer
    `scale`, the standard deviation of gains.
    """

    scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        wide, narrow = WIDTHS
        self.error, self.gain = mlp(features, wide, wide, 2), mlp(features, narrow, narrow, 1)
        self.register_buffer("scale", torch.ones(()))

    def surprise(self, evidence: Evidence) -> Tensor:
        """[B]: the surprise of a frame, the sum of both parts, each of its worst token."""
        high, _ = self.above(evidence)
        return high.amax(dim=1) + MEMORY * self.missing(evidence).amax(dim=1)

    def above(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """By how many spreads the log error of each token is above what is expected, and the
        logarithm of the spread.
        """
        middle, spread = self.error(evidence.features).unbind(-1)
        spread = spread.clamp(*SPREAD)
        return ((evidence.error + LEAST).log() - middle) * (-spread).exp(), spread

    def missing(self, evidence: Evidence) -> Tensor:
        """How far the gain of each token is below what is expected, in standard deviations."""
        return self.gain(evidence.features).squeeze(-1) - evidence.gain / self.scale


def evidence(
    method: Causal,
    clips: Tensor,
    targets: Tensor,
    known: Sequence[tuple[Tensor, Tensor]],
    seen: Sequence[int],
) -> list[Evidence]:
    """The evidence of the frame after each number of frames seen, at least SHORT, of clips [B, C,
    F, H, W]. targets: [B, T, D]; known: of the method, for each.

    The gain is half the difference of both predictions' squared errors, over their distance.
    """
    plane, tubelet = method.encoder.grid.frame.tokens, method.encoder.patch_embed.size[0]
    ends = [clips[:, :, (n - SHORT) * tubelet : (n + 1) * tubelet] for n in seen]
    (without,) = method.foreseen(torch.cat(ends), (SHORT,))
    result = []
    for n, (states, memory), short in zip(seen, known, without.split(len(clips)), strict=True):
        target = targets[:, n * plane : (n + 1) * plane]
        apart = (memory - short).square().mean(dim=-1)
        features = (states, memory - short, (apart + LEAST).log().unsqueeze(-1))
        gain = ((short - target).square() - (memory - target).square()).mean(dim=-1) / 2
        error = (memory - target).abs().mean(dim=-1)
        result.append(Evidence(torch.cat(features, dim=-1), error, gain / (apart + APART).sqrt()))
    return result


def span_of(method: Any, stride: int) -> int:
    """The frames of a video from the first to the last of a clip."""
    return (method.encoder.grid.frames * method.encoder.patch_embed.size[0] - 1) * stride + 1


def targets_of(method: Any, clips: Tensor) -> Tensor:
    """[B, T, D]: what the errors of predictions are measured to."""
    targets = method.targets(clips)
    return F.layer_norm(targets, targets.shape[-1:]) if method.normalise else targets


def fitted(method: Causal, stride: int, noise: float) -> Expectation:
    """Fit an expectation to COUNT possible videos of the strength `noise`."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for number in tqdm(range(COUNT), desc="what is expected", unit="video", ncols=100):
        each = _tokens(method, possible(FIRST + number, noise).video, stride)
        rows = torch.randperm(len(each.error), generator=generator)[:TOKENS]
        parts.append(Evidence(*(x[rows] for x in each)))
    samples = Evidence(*(torch.cat(column) for column in zip(*parts, strict=True)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = Expectation(samples.features.shape[-1])
    expected.scale.copy_(samples.gain.std())

    def drawn(rows: Tensor) -> Evidence:
        return Evidence(*(x[rows] for x in samples))

    def error(rows: Tensor) -> Tensor:
        """The negative log likelihood of a normal distribution of the log error."""
        high, spread = expected.above(drawn(rows))
        return (high.square() / 2 + spread).mean()

    def gain(rows: Tensor) -> Tensor:
        return expected.missing(drawn(rows)).square().mean()

    learned = (expected.error, error), (expected.gain, gain)
    for (network, loss), steps in zip(learned, STEPS, strict=True):
        fit(
            network, loss, len(samples.error), steps=steps, batch=BATCH, rate=RATE, decay=DECAY,
            generator=generator,
        )  # fmt: skip
    return expected.requires_grad_(False).eval()


@torch.no_grad()
def _tokens(method: Causal, video: np.ndarray, stride: int) -> Evidence:
    """The evidence of every token that the windows of a video [F, H, W, 3] predict, in one row."""
    tubelet, span = method.encoder.patch_embed.size[0], span_of(method, stride)
    frames = torch.from_numpy(video).permute(3, 0, 1, 2).float() / 255
    starts = range(frames.shape[1] - span + 1)
    clips = torch.stack([frames[:, s : s + span : stride] for s in starts])
    clips = clips.to(next(method.parameters()).device)
    seen = [n // tubelet for n in method.contexts]
    each = evidence(method, clips, targets_of(method, clips), method.known(clips, seen), seen)
    return Evidence(*(torch.cat(column).flatten(0, 1).cpu() for column in zip(*each, strict=True)))
