"""The protocol of a model that plans are made with, and the true dynamics of a world as a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vicreg_jepa.worlds.world import ACTIONS, SPEED, State, World

ENCODED = 512  # frames at once


class LatentModel(Protocol):
    """A world model with latents of D dimensions."""

    @property
    def actions(self) -> int:
        """The number A of action dimensions."""

    def encode(self, frames: Tensor) -> Tensor:
        """Latents [B, D] of frames, uint8 [B, H, W, C]."""

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        """Latents [B, K, H, D] after each action. start: [B, D]; actions: [B, K, H, A] in [-1, 1].
        A row of the result depends only on the same row of the arguments.
        """


@dataclass(frozen=True)
class TrueModel:
    """The dynamics of a world, without noise, as a model: a control for learned models.

    A latent is the position and the layout: D = 2 + the numbers in a layout. The layout is the same
    in all latents of an episode, so it adds nothing to a distance.
    """

    world: World
    actions: int = ACTIONS

    def encode(self, frames: Tensor) -> Tensor:
        """Raises TypeError: this model reads states, not frames."""
        raise TypeError("frames: got frames, TrueModel takes states; call observe(state)")

    def observe(self, state: State) -> Tensor:
        """Latents [N, D] of states."""
        return torch.cat([state.position, state.layout.flatten(1).to(state.position)], dim=1)

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        count, candidates, horizon, _ = actions.shape
        shape = self.world.layout_shape
        layout = start[:, None, 2:].round().long().expand(-1, candidates, -1)
        layout = layout.reshape(count * candidates, *shape)
        position = start[:, None, :2].expand(-1, candidates, -1).reshape(-1, 2)
        push = SPEED * actions.clamp(-1, 1).flatten(0, 1)
        places = []
        for step in range(horizon):
            position = self.world.moved(position, layout, push[:, step])
            places.append(position)
        path = torch.stack(places, dim=1).unflatten(0, (count, candidates))
        carried = start[:, None, None, 2:].expand(-1, candidates, horizon, -1)
        return torch.cat([path, carried], dim=3)


def observe(model: LatentModel, world: World, state: State) -> Tensor:
    """Latents [N, D] of what a model sees of states: the frames; for TrueModel, the states."""
    if isinstance(model, TrueModel):
        return model.observe(state)
    with torch.no_grad():
        return model.encode(world.render(state))


@torch.no_grad()
def encoded(model: LatentModel, world: World, states: State) -> Tensor:
    """Latents [N, T, D] of the rendered frames of states [N, T, ...], some at a time."""
    flat = State(*(field.flatten(0, 1) for field in states))
    rows = torch.arange(len(flat.seed)).split(ENCODED)
    parts = [model.encode(world.render(flat.rows(some))) for some in rows]
    return torch.cat(parts).unflatten(0, states.seed.shape)
