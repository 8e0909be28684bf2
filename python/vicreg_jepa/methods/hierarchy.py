"""Levels above a world model: what macro-actions do to its latents, and how many steps lie between
them. The world model is that of an earlier run and stays as it is.

A level encodes chunks of up to so many actions as codes, and predicts the latent after a chunk from
the latent before it and its code. The codes have VICReg's variance and covariance (Bardes, Ponce
and LeCun, 2022, arXiv:2105.04906), so that they fill the box in which planners draw them, and
inverse dynamics: a code must be read from the latents before and after its chunk, so that it says
what changes them and nothing else. Landmarks count the steps (models/landmarks.py).

As the encoder is frozen, latents stay valid: those of earlier windows are kept, and each step
trains on chunks of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vicreg_jepa.methods import world
from vicreg_jepa.methods.base import MethodKind, register
from vicreg_jepa.models.landmarks import Counts, Landmarks
from vicreg_jepa.models.macro import Macro
from vicreg_jepa.ops.choose import Kernels

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config

KEPT = 2048  # windows whose latents are kept
PAIRS = 4  # of consecutive frames of a window that are encoded
CHUNKS = 256  # of a step and a level
UNIFORM = 3**-0.5  # the deviation of numbers that are uniform in [-1, 1]


@dataclass(frozen=True)
class Weights:
    prediction: float
    inverse: float
    variance: float
    covariance: float


class Hierarchy(nn.Module):
    """world: the lowest level, frozen. levels: those above, from the lowest. spacing: of the
    landmarks, in mean distances of consecutive latents. window: the actions of a window.

    `begin` must be called, or a checkpoint loaded, before the first step.
    """

    step: Tensor
    latents: Tensor
    acted: Tensor
    times: Tensor
    begun: Tensor

    def __init__(
        self,
        below: world.World,
        levels: list[Macro],
        kernels: Kernels,
        *,
        weights: Weights,
        latent: int,
        window: int,
        landmarks: int,
        spacing: float,
    ) -> None:
        super().__init__()
        self.world, self.levels = below.requires_grad_(False), nn.ModuleList(levels)
        self.counts = Counts(latent, landmarks)
        self.kernels, self.weights, self.spacing = kernels, weights, spacing
        self.actions = below.actions
        frames = 2 * PAIRS
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("latents", torch.zeros(KEPT, frames, latent))
        self.register_buffer("acted", torch.zeros(KEPT, window, below.actions))
        self.register_buffer("times", torch.zeros(KEPT, frames, dtype=torch.int64))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def begin(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of a trained method `world`. Raises ValueError if they do not fit."""
        mine = self.world.state_dict()
        try:
            self.world.load_state_dict({name: z for name, z in weights.items() if name in mine})
        except RuntimeError as error:
            raise ValueError(
                f"training.begin: the run does not fit the settings: {error}"
            ) from error
        self.begun.fill_(True)

    def prepare(self, frames: Tensor) -> None:
        """Does nothing: the world model is trained, and the levels see latents."""

    def encode(self, frames: Tensor) -> Tensor:
        """Latents [B, D] of frames uint8 [B, H, W, C]."""
        return self.world.encode(frames)

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        """The world model's: [B, D], [B, K, H, A] -> [B, K, H, D]."""
        return self.world.rollout(start, actions)

    def landmarks(self) -> Landmarks:
        """The landmarks of the training."""
        return self.counts.landmarks()

    def forward(self, frames: Tensor, actions: Tensor, process_group: Any = None) -> Tensor:
        """The mean loss of the levels over chunks of all windows that are kept, after those of
        frames uint8 [B, T + 1, H, W, C] and actions float [B, T, A] are added. In training mode
        the landmarks are counted, too.
        """
        if process_group is not None:
            raise ValueError("ranks: got several processes, hierarchy takes one")
        if not bool(self.begun):
            raise ValueError("training.begin: no world model was loaded, takes the run of one")
        generator = torch.Generator().manual_seed(int(self.step))
        if self.training:
            self._see(frames, actions, generator)
        losses = [self._loss(level, generator) for level in self.levels]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _see(self, frames: Tensor, actions: Tensor, generator: torch.Generator) -> None:
        """Keep the latents of windows, and count their landmarks."""
        times = world.pair_times(PAIRS, actions.shape[1], generator)
        z = self.encode(frames[:, times].flatten(0, 1)).unflatten(0, (len(frames), -1)).float()
        if not int(self.step):
            moved = torch.linalg.vector_norm(z[:, 1::2] - z[:, ::2], dim=2).mean()
            self.counts.spacing.copy_(self.spacing * moved)
        try:
            self.counts.see(z, times)
        except ValueError as error:
            raise ValueError(
                f"model.landmarks: got {len(self.counts.places)}, takes more, or a larger "
                f"model.spacing ({error})"
            ) from error
        rows = (int(self.step) * len(z) + torch.arange(len(z), device=z.device)) % KEPT
        self.latents[rows], self.acted[rows] = z, actions.float()
        self.times[rows] = torch.tensor(times, device=z.device)

    def _loss(self, level: Any, generator: torch.Generator) -> Tensor:
        """The loss of one level, a Macro, on pairs of chunks that follow each other."""
        first, second, third = self._triples(level.longest, generator)
        before, middle, after = first[0], second[0], third[0]
        codes = level.codes(*self._chunks(first, second, level.longest))
        onward = level.codes(*self._chunks(second, third, level.longest))
        predicted = level.predictor.unroll(before[:, None], torch.stack([codes, onward], dim=1))
        both = torch.cat([codes, onward]).float()
        ends = torch.cat([before, middle]), torch.cat([middle, after])
        read = torch.tanh(level.inverse(torch.cat(ends, dim=1)))
        variance, covariance = self.kernels.variance_covariance(both / UNIFORM, None)
        weights = self.weights
        return (
            weights.prediction * F.mse_loss(predicted.float(), torch.stack([middle, after], dim=1))
            + weights.inverse * F.mse_loss(read.float(), both)
            + weights.variance * variance
            + weights.covariance * covariance
        )

    def _triples(self, longest: int, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
        """Three frames of each of at most CHUNKS windows, with 1 to `longest` actions between:
        (latents [N, D], windows [N], times [N]) of each. What is drawn is on the CPU.
        """
        every = self.times.cpu()
        there = min(KEPT, int((every[:, -1] > 0).sum()))
        windows = torch.randint(there, (CHUNKS,), generator=generator)
        triples = torch.tensor(list(combinations(range(2 * PAIRS), 3)))
        times = every[windows][:, triples]  # [CHUNKS, triples, 3]
        gaps = times.diff(dim=2)
        fits = ((gaps >= 1) & (gaps <= longest)).all(dim=2)
        windows, fits = windows[fits.any(dim=1)], fits[fits.any(dim=1)]
        if not len(windows):
            raise ValueError(
                f"model.macros: got {longest}, but no three frames of a window are so near to each "
                "other: takes more, or a smaller data.window"
            )
        chosen = triples[torch.multinomial(fits.float(), 1, generator=generator)[:, 0]]
        return [
            (self.latents[windows, frame], windows, every[windows, frame])
            for frame in chosen.unbind(dim=1)
        ]

    def _chunks(
        self, first: tuple[Tensor, ...], last: tuple[Tensor, ...], longest: int
    ) -> tuple[Tensor, Tensor]:
        """(actions [N, longest, A] from one frame on, the numbers [N] of those up to another)."""
        _, windows, times = first
        steps = times[:, None] + torch.arange(longest)
        steps = steps.clamp(max=self.acted.shape[1] - 1)
        return self.acted[windows[:, None], steps], (last[2] - times).to(self.acted.device)

    def after_step(self) -> None:
        self.step += 1

    def features(self, frames: Tensor) -> Tensor:
        """[B, D] of frames uint8 [B, H, W, C], the input of a probe."""
        return self.encode(frames)

    def exported(self) -> tuple[str, nn.Module]:
        return self.world.exported()


def build(config: Config, kernels: Kernels, channels: int) -> Hierarchy:
    model, loss = config.model, config.loss
    levels = [
        Macro(
            longest, config.data.actions, model.latent, model.macro_dim, model.predictor_dim,
            model.predictor_depth, model.waves, model.frequency,
        )
        for longest in model.macros
    ]  # fmt: skip
    return Hierarchy(
        world.frozen(config, kernels, channels), levels, kernels,
        weights=Weights(loss.prediction, loss.inverse, loss.variance, loss.covariance),
        latent=model.latent, window=config.data.window, landmarks=model.landmarks,
        spacing=model.spacing,
    )  # fmt: skip


def check(config: Config) -> None:
    """Check the settings that must fit together."""
    model, data = config.model, config.data
    world.check_networks(config)
    if config.training.begin is None:
        raise ValueError(
            "training.begin: missing, hierarchy takes the folder of a run of the method world"
        )
    if list(model.macros) != sorted(set(model.macros)):
        raise ValueError(
            f"model.macros: got {model.macros}, takes lengths that grow from level to level"
        )
    if model.macros[-1] > data.window:
        raise ValueError(
            f"model.macros: got {model.macros}, takes at most data.window, {data.window} actions"
        )
    if data.window < 2 * PAIRS:
        raise ValueError(f"data.window: got {data.window}, hierarchy takes at least {2 * PAIRS}")


SETTINGS = (
    *world.NETWORKS,
    "loss.prediction",
    "loss.inverse",
    "loss.variance",
    "loss.covariance",
    "model.macros",
    "model.macro_dim",
    "model.landmarks",
    "model.spacing",
    "training.begin",
)
register(MethodKind("hierarchy", Hierarchy, build, "trajectories", "trajectories", SETTINGS, check))
