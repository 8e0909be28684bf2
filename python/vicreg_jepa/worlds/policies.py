"""Who acts: functions of the world and its true state, whose random ones draw by seed and time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vicreg_jepa.worlds import draws
from vicreg_jepa.worlds.draws import Stream
from vicreg_jepa.worlds.world import ACTIONS, State, World

HOLD = 12  # steps for which a walk keeps its direction
JITTER = 0.2

Policy = Callable[[World, State], Tensor]


def walk_actions(seed: Tensor, time: Tensor, count: int) -> Tensor:
    """Actions [N, count] of a walk: a uniform one of [-1, 1]^count that is held for HOLD steps,
    where an episode begins anywhere in its first one, and uniform jitter of [-JITTER, JITTER] a
    step; clamped to [-1, 1].
    """
    phase = draws.integers(draws.uniform(seed, Stream.PHASE, 0, 1)[:, 0], 0, HOLD - 1)
    held = 2 * draws.uniform(seed, Stream.POLICY, (time + phase) // HOLD, count) - 1
    jitter = 2 * draws.uniform(seed, Stream.JITTER, time, count) - 1
    return (held + JITTER * jitter).clamp(-1, 1)


def uniform_actions(seed: Tensor, time: Tensor, count: int) -> Tensor:
    """Actions [N, count], uniform in [-1, 1] and each step's of its own."""
    return 2 * draws.uniform(seed, Stream.POLICY, time, count) - 1


def walk(world: World, state: State) -> Tensor:
    return walk_actions(state.seed, state.time, ACTIONS)


def uniform(world: World, state: State) -> Tensor:
    return uniform_actions(state.seed, state.time, ACTIONS)


def still(world: World, state: State) -> Tensor:
    return torch.zeros_like(state.position)


def expert(world: World, state: State) -> Tensor:
    return world.expert(state)


def straight(world: World, state: State) -> Tensor:
    return world.straight(state)


BLIND: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "walk": walk_actions,
    "uniform": uniform_actions,
}
POLICIES: dict[str, Policy] = {
    "walk": walk,
    "uniform": uniform,
    "still": still,
    "expert": expert,
    "straight": straight,
}
