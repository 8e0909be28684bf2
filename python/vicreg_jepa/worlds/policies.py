"""Policies: functions of the world and its true state. Random policies use the seed and the time
of the state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vicreg_jepa.worlds import draws
from vicreg_jepa.worlds.draws import Stream
from vicreg_jepa.worlds.world import ACTIONS, State, World

HOLD = 12  # a walk repeats an action for so many steps
JITTER = 0.2

Policy = Callable[[World, State], Tensor]


def walk_actions(seed: Tensor, time: Tensor, count: int) -> Tensor:
    """Actions [N, count] of a random walk with temporal correlation: an action uniform in
    [-1, 1]^count is held for HOLD steps (the first one for 1 to HOLD), each step adds uniform
    jitter in [-JITTER, JITTER], and the sum is clamped to [-1, 1].
    """
    phase = draws.integers(draws.uniform(seed, Stream.PHASE, 0, 1)[:, 0], 0, HOLD - 1)
    held = 2 * draws.uniform(seed, Stream.POLICY, (time + phase) // HOLD, count) - 1
    jitter = 2 * draws.uniform(seed, Stream.JITTER, time, count) - 1
    return (held + JITTER * jitter).clamp(-1, 1)


def uniform_actions(seed: Tensor, time: Tensor, count: int) -> Tensor:
    """Actions [N, count], uniform in [-1, 1] and independent in each step."""
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
