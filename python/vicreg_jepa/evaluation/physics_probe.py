"""What can be read from the embeddings of physics videos: where a thing is, how fast, which one it
is, and what nobody can predict.

Each probe is fitted to the frozen tokens of some videos and measured on others, none of which was
trained on. Facts of a frame are read by an attentive probe (token_probe.py) from all of its
tokens and those of the frame a model's step before; facts of a patch by ridge regression
(state_probe.py) from its own token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vicreg_jepa.evaluation import state_probe, token_probe
from vicreg_jepa.physics import SIZE, possible
from vicreg_jepa.physics.scene import COLOURS, SHAPES
from vicreg_jepa.physics.unpredictable import of_possible

# float32 [B, C, 2, H, W] in [0, 1], two frames of a clip -> tokens [B, 2 T, D]
TokensOf = Callable[[Tensor], Tensor]

FIRST = 1 << 50  # the first seed: trainings have (seed << 32) + index
HELD_OUT = 0.25  # the share of the videos that the probes are measured on
EACH = 4  # pairs of frames drawn from each video
PATCHES = 4  # of each frame, whose facts are read from their own tokens
EDGE = 7  # pixels: a thing nearer to the edge of the picture may be cut by it


@dataclass(frozen=True)
class Seen:
    """clips: uint8 [N, 2, H, W, 3], two frames `stride` apart, EACH of a video. frames: facts of
    the second frame, [N, k], or int64 [N] of classes; patches: of its patches, [N, 64].
    """

    clips: Tensor
    frames: dict[str, Tensor]
    patches: dict[str, Tensor]


def seen(count: int, noise: float, stride: int) -> Seen:
    """The first `count` videos, from FIRST on, of one thing that is in view in some frames. EACH of
    these are drawn at random, each with the one `stride` before it.
    """
    clips: list[NDArray] = []
    noises: list[dict[str, NDArray]] = []
    rows: list[tuple[int, int, Any]] = []
    seed = FIRST
    while len(clips) < count * EACH:
        rng = np.random.default_rng([FIRST, seed])
        video, record = possible(seed)
        if len(record["things"]) == 1:
            place = np.array(record["position"])[:, 0]
            inside = np.all((place > EDGE) & (place < SIZE - EDGE), axis=1)
            inside[record["hidden"][0]] = False
            frames = np.flatnonzero(inside[stride:] & inside[:-stride]) + stride
            if len(frames):
                disturbance = of_possible(seed, noise)
                for frame in rng.choice(frames, EACH, replace=len(frames) < EACH).tolist():
                    both = [frame - stride, frame]
                    clips.append(disturbance(video[both], both))
                    if noise:  # else nothing is drawn, and there is nothing to read
                        noises.append(disturbance.facts(frame))
                    rows.append((seed, frame, record))
        seed += 1

    def of(key: str) -> Tensor:
        return torch.tensor([record[key][frame][0] for _, frame, record in rows])

    def named(key: str, names: list[str]) -> Tensor:
        return torch.tensor([names.index(record["things"][0][key]) for _, _, record in rows])

    def noisy(name: str) -> Tensor:
        return torch.tensor(np.stack([facts[name] for facts in noises])).float()

    facts = {"position": of("position").float(), "velocity": of("velocity").float()}
    facts |= {"colour": named("colour", list(COLOURS)), "shape": named("shape", list(SHAPES))}
    patches = {}
    if noise:
        facts |= {name: noisy(name) for name in ("light", "shake")}
        patches = {name: noisy(name) for name in ("texture", "camera", "leaves")}
    return Seen(torch.from_numpy(np.stack(clips)), facts, patches)


@torch.no_grad()
def scores(tokens_of: TokensOf, videos: Seen, seed: int = 0) -> dict[str, float]:
    """For each fact R^2 on held-out videos, 1 - the squared error over that of the best constant;
    for colour and shape the share that is right. Raises ValueError if a frame has not 64 tokens and
    facts of patches are asked for.
    """
    parts = videos.clips.split(32)
    read = [tokens_of(part.permute(0, 4, 1, 2, 3).float() / 255) for part in parts]
    tokens = torch.cat(read).float().unflatten(1, (2, -1))
    count = len(tokens)
    cut = count - EACH * round(HELD_OUT * count / EACH)
    result = _attended(tokens, videos.frames, cut, seed)
    if videos.patches:
        own = tokens[:, 1]  # [N, 64, D]
        if own.shape[1] != next(iter(videos.patches.values())).shape[1]:
            raise ValueError(f"tokens: got {own.shape[1]} a frame, takes 64, of 8 x 8 pixels each")
        generator = torch.Generator().manual_seed(seed)
        places = torch.rand(count, own.shape[1], generator=generator).argsort(dim=1)[:, :PATCHES]
        rows = torch.arange(count)[:, None]
        facts = {name: fact[rows, places].flatten() for name, fact in videos.patches.items()}
        result |= _read(own[rows, places].flatten(0, 1), facts, cut * PATCHES)
    return result


def _attended(tokens: Tensor, facts: dict[str, Tensor], cut: int, seed: int) -> dict[str, float]:
    """The scores of one attentive probe of all facts, fitted to the samples before `cut`."""
    goals = {name: state_probe.columns(fact, _classes(fact)) for name, fact in facts.items()}
    goal = torch.cat(list(goals.values()), dim=1)
    with torch.enable_grad():
        guess = token_probe.predicted(tokens[:cut], goal[:cut], tokens[cut:], seed)
    widths = [columns.shape[1] for columns in goals.values()]
    each = zip(facts.items(), guess.split(widths, dim=1), strict=True)
    return {name: _score(fact, columns, cut) for (name, fact), columns in each}


def _read(features: Tensor, facts: dict[str, Tensor], cut: int) -> dict[str, float]:
    """The scores of ridge regression, fitted to the samples before `cut`."""
    middle = features[:cut].mean(dim=0)
    x, z = features[:cut] - middle, features[cut:] - middle
    result = {}
    for name, fact in facts.items():
        target = state_probe.columns(fact[:cut], _classes(fact))
        mean = target.mean(dim=0)
        result[name] = _score(fact, state_probe.ridge(x, target - mean, z) + mean, cut)
    return result


def _score(fact: Tensor, guess: Tensor, cut: int) -> float:
    """R^2, or the share that is right, of the samples from `cut` on."""
    error = state_probe.error(fact[cut:], guess)
    if not fact.is_floating_point():
        return 1 - error
    mean = state_probe.columns(fact[:cut], 0).mean(dim=0)
    best = state_probe.error(fact[cut:], mean.expand(len(guess), -1))
    return 1 - (error / best) ** 2


def _classes(fact: Tensor) -> int:
    return 0 if fact.is_floating_point() else int(fact.max()) + 1


def pixels(clips: Tensor) -> Tensor:
    """The patches of 8 x 8 pixels themselves, [B, 2 T, 192]: the control that has lost nothing."""
    size = 8
    batch, channels, frames, height, width = clips.shape
    x = clips.reshape(batch, channels, frames, height // size, size, width // size, size)
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
