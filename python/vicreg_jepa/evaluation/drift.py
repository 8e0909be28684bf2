"""The drift of a world model: the error of the predicted position over the steps of a rollout that
sees only the first frame.

Positions are read from latents by a probe that is fitted to frames of other episodes; from
predicted pixels, as the centre of the dot's channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicreg_jepa.config import Config
from vicreg_jepa.data.trajectories import labelled
from vicreg_jepa.evaluation import state_probe
from vicreg_jepa.methods.world_pixels import WorldPixels
from vicreg_jepa.planning.model import encoded
from vicreg_jepa.worlds.episodes import walks
from vicreg_jepa.worlds.world import World

COLLECTION = 2**20 + 2  # of the walks: no training has so large a seed
STEPS = 90
SHOWN = (1, 2, 4, 8, 16, 32, 64, 90)
FITTED = 12000  # frames, a fifth of them not used
PROBE_STEPS, PROBE_BATCH = 3000, 512


@dataclass(frozen=True)
class Drift:
    """The drift of one model. mean, median: the error in pixels after each step, [STEPS]. read: the
    mean error of the positions that are read from the true frames.
    """

    name: str
    mean: list[float]
    median: list[float]
    read: float


def centre(pixels: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, 2]: the centre (x, y) of the first channel of frames [N, C * H * W], in pixels."""
    dot = pixels.unflatten(1, tuple(shape))[:, 0].clamp(min=0)
    height, width = dot.shape[1:]
    total = dot.sum(dim=(1, 2)).clamp(min=1e-6)
    x = (dot.sum(dim=1) @ (torch.arange(width) + 0.5)) / total
    y = (dot.sum(dim=2) @ (torch.arange(height) + 0.5)) / total
    return torch.stack((x, y), dim=1)


def positions(settings: Config, model: Any, latents: Sequence[Tensor]) -> list[Tensor]:
    """The positions [N, T, 2] that are read from latents [N, T, D]."""
    if isinstance(model, WorldPixels):
        return [centre(z.flatten(0, 1), model.shape).unflatten(0, z.shape[:2]) for z in latents]
    fit, _ = labelled(settings, FITTED)
    with torch.no_grad():
        seen = torch.cat([model.encode(frames) for frames in fit.frames.split(512)])
    middle, spread = seen.mean(dim=0), seen.std(dim=0).clamp_min(1e-6)
    place = fit.facts["position"].double()
    mean, scale = place.mean(dim=0), place.std(dim=0)
    asked = torch.cat([z.flatten(0, 1) for z in latents])
    read = state_probe.perceptron(
        (seen - middle) / spread, (place - mean) / scale, (asked - middle) / spread,
        settings.seed, steps=PROBE_STEPS, batch=PROBE_BATCH,
    )  # fmt: skip
    parts = (read * scale + mean).float().split([z.shape[0] * z.shape[1] for z in latents])
    return [part.unflatten(0, z.shape[:2]) for part, z in zip(parts, latents, strict=True)]


def measured(name: str, settings: Config, model: Any, world: World, count: int) -> Drift:
    """The drift of a model over `count` walks."""
    states, actions = walks(world, COLLECTION, count, STEPS)
    true = encoded(model, world, states)
    with torch.no_grad():
        path = torch.cat([
            model.rollout(start, acted[:, None])[:, 0]
            for start, acted in zip(true[:, 0].split(50), actions.split(50), strict=True)
        ])  # fmt: skip
    read, predicted = positions(settings, model, [true, path])
    place = states.position
    off = torch.linalg.vector_norm(predicted - place[:, 1:], dim=2)
    floor = torch.linalg.vector_norm(read - place, dim=2)
    return Drift(name, off.mean(dim=0).tolist(), off.median(dim=0).values.tolist(),
                 float(floor.mean()))  # fmt: skip


def still(world: World, count: int) -> Drift:
    """The drift of the prediction that nothing moves."""
    states, _ = walks(world, COLLECTION, count, STEPS)
    off = torch.linalg.vector_norm(states.position[:, 1:] - states.position[:, :1], dim=2)
    return Drift("standing still", off.mean(dim=0).tolist(),
                 off.median(dim=0).values.tolist(), 0.0)  # fmt: skip


def table(drifts: Sequence[Drift]) -> str:
    width = max(len(drift.name) for drift in drifts) + 2
    lines = [f"{'mean error in pixels':<{width}}{'true frame':>12}"
             + "".join(f"{step:>8}" for step in SHOWN)]  # fmt: skip
    for drift in drifts:
        cells = "".join(f"{drift.mean[step - 1]:>8.2f}" for step in SHOWN)
        lines.append(f"{drift.name:<{width}}{drift.read:>12.2f}{cells}")
    lines.append(arithmetic())
    return "\n".join(lines)


def arithmetic() -> str:
    """A sentence that says how small errors of single steps compound over many steps."""
    words = [f"{0.999**steps:.3%} after {steps:,}" for steps in (1000, 10_000)]
    return f"a step that keeps 99.9 % of what is right leaves {words[0]} steps and {words[1]}"


def draw(drifts: Sequence[Drift], path: Path) -> None:
    """Write a PNG of the errors over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for drift, colour in zip(drifts, cycle(COLOURS), strict=False):
        axis.plot(range(1, STEPS + 1), drift.mean, color=colour, label=drift.name)
        if drift.read:
            axis.axhline(drift.read, color=colour, linewidth=0.8, linestyle=":")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("steps of the rollout, from one true frame")
    axis.set_ylabel("mean error of the position, pixels")
    axis.set_title("Dotted: the error of reading the position from true frames", fontsize=9)
    axis.grid(alpha=0.25, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


COLOURS = ("#d1495b", "#30638e", "#8a8f98", "#edae49", "#3d8b5f")
