"""Models of where the dot will be: its own place, by integrated motion, beside what it sees.

A latent here is [place (x, y), rest], and a plan minimises the distance of the place to a subgoal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vicreg_jepa.models.fitting import fit
from vicreg_jepa.models.perceptron import mlp
from vicreg_jepa.planning.energies import Arrival, Energy, to_goal
from vicreg_jepa.planning.model import LatentModel, TrueModel, encoded
from vicreg_jepa.worlds.episodes import walks
from vicreg_jepa.worlds.world import ACTIONS, SPEED, State, World

COLLECTION = 2**20 + 2  # of the walks that the motion is fitted to: no training has so large a seed
WALKS, WALKED = 256, 24
HIDDEN, FITTED, BATCH, RATE, DECAY = 128, 1200, 256, 2e-3, 0.01


class Motion(nn.Module):
    """What an action moves the dot by, in pixels [N, 2], of latents [N, D] and actions [N, A]. The
    dot feels its own motion, so this is fitted to walks without a label.
    """

    def __init__(self, latent: int, actions: int) -> None:
        super().__init__()
        self.change = mlp(latent + actions, HIDDEN, HIDDEN, 2)

    def forward(self, latents: Tensor, actions: Tensor) -> Tensor:
        return SPEED * (actions + self.change(torch.cat([latents, actions], dim=-1)))


def fitted(model: LatentModel, world: World, seed: int = 0) -> Motion:
    """The motion that a trained model's latents tell, fitted to walks by AdamW."""
    states, actions = walks(world, COLLECTION, WALKS, WALKED)
    latents = encoded(model, world, states)[:, :-1].flatten(0, 1)
    moved = states.position.diff(dim=1).flatten(0, 1)
    acted = actions.flatten(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        motion = Motion(latents.shape[1], acted.shape[1])

        def loss(rows: Tensor) -> Tensor:
            return F.mse_loss(motion(latents[rows], acted[rows]), moved[rows])

        fit(motion, loss, len(moved), steps=FITTED, batch=BATCH, rate=RATE, decay=DECAY)
    return motion.eval().requires_grad_(False)


class PlaceModel(Protocol):
    """A LatentModel whose latents begin with the place."""

    @property
    def actions(self) -> int: ...
    def encode(self, frames: Tensor) -> Tensor: ...
    def rollout(self, start: Tensor, actions: Tensor) -> Tensor: ...
    def start(self, place: Tensor, latents: Tensor, state: State) -> Tensor:
        """[N, 2 + ...]: the latents at places [N, 2], of what is seen, [N, D], in true states."""


@dataclass(frozen=True)
class LearnedPlaces:
    """The places that a world model and a motion predict. It never looks at the state."""

    model: LatentModel
    motion: Motion

    @property
    def actions(self) -> int:
        return self.model.actions

    def encode(self, frames: Tensor) -> Tensor:
        raise TypeError("frames: got frames, LearnedPlaces takes places too; call start")

    def start(self, place: Tensor, latents: Tensor, state: State) -> Tensor:
        return torch.cat([place.to(latents), latents], dim=1)

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        place, latents = start[:, :2], start[:, 2:]
        path = self.model.rollout(latents, actions)
        first = latents[:, None, None].expand(-1, actions.shape[1], 1, -1)
        before = torch.cat([first, path[:, :, :-1]], dim=2)
        moved = self.motion(before, actions.clamp(-1, 1))
        return torch.cat([place[:, None, None] + moved.cumsum(dim=2), path], dim=3)


@dataclass(frozen=True)
class TruePlaces:
    """The true dynamics, a control of LearnedPlaces: the place, the true position, the layout."""

    world: World
    actions: int = ACTIONS

    def encode(self, frames: Tensor) -> Tensor:
        raise TypeError("frames: got frames, TruePlaces takes states; call start")

    def start(self, place: Tensor, latents: Tensor, state: State) -> Tensor:
        return torch.cat([place.to(state.position), TrueModel(self.world).observe(state)], dim=1)

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        path = TrueModel(self.world).rollout(start[:, 2:], actions)
        moved = path[..., :2] - start[:, None, None, 2:4]
        return torch.cat([start[:, None, None, :2] + moved, path], dim=3)


@dataclass(frozen=True)
class OfPlaces(Energy):
    """An energy of the places of a path alone."""

    energy: Energy

    def __call__(self, path: Tensor, actions: Tensor) -> Tensor:
        return self.energy(path[..., :2], actions)

    def rows(self, which: Tensor) -> Energy:
        return OfPlaces(self.energy.rows(which))


@dataclass(frozen=True)
class PlaceArrival(Arrival):
    """Arrival at a place: goal is [B, 2]."""

    def __call__(self, path: Tensor) -> Tensor:
        return super().__call__(path[..., :2])

    def rows(self, which: Tensor) -> PlaceArrival:
        return PlaceArrival(self.goal[which], self.threshold, self.at)


def to_place(place: Tensor, near: float) -> Energy:
    """`to_goal` of the place [B, 2]."""
    return OfPlaces(to_goal(place, near))
