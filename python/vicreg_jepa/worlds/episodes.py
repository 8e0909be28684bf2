"""Episodes: frames, actions and what is true, played by a policy in many environments at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vicreg_jepa.worlds.policies import Policy
from vicreg_jepa.worlds.world import State, World

AT_ONCE = 64  # environments: their frames of 100 steps are 55 MB


@dataclass(frozen=True)
class Episode:
    """T actions, and T + 1 frames around them.

    frames: uint8 [T + 1, H, W, C]; actions: float32 [T, A]; states: what is true at each frame, by
    name, [T + 1, ...]; record: what is known of the episode, ready for JSON.
    """

    frames: NDArray[np.uint8]
    actions: NDArray[np.float32]
    states: dict[str, NDArray[Any]]
    record: dict[str, Any]


def episode_seed(seed: int, number: int) -> int:
    """The seed of episode `number` of a collection."""
    return (seed << 32) + number


def play(
    world: World, policy: Policy, seed: int, episodes: int, length: int, first: int = 0
) -> Iterator[Episode]:
    """Episodes first, first + 1, ... of a seed, `episodes` of them, each of `length` actions."""
    for start in range(first, first + episodes, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, first + episodes))
        seeds = torch.tensor([episode_seed(seed, number) for number in numbers])
        states, actions = rollout(world, policy, world.reset(seeds), length)
        facts = [world.facts(state) for state in states]
        frames = torch.stack([world.render(state) for state in states], dim=1)
        goals, reached = states[0].goal.tolist(), world.success(states[-1]).tolist()
        for place in range(len(numbers)):
            truths = {
                name: torch.stack([fact[name][place] for fact in facts]).numpy()
                for name in facts[0]
            }
            record = {
                "seed": int(seeds[place]),
                "goal": goals[place],
                "success": reached[place],
            }
            acted = torch.stack([action[place] for action in actions]).numpy()
            yield Episode(frames[place].numpy(), acted, truths, record)


def rollout(
    world: World, policy: Policy, state: State, steps: int
) -> tuple[list[State], list[torch.Tensor]]:
    """(states, one more than steps, and the actions [N, 2] between them, as clamped)."""
    states, actions = [state], []
    for _ in range(steps):
        action = policy(world, state).clamp(-1, 1)
        state = world.step(state, action)
        states.append(state)
        actions.append(action)
    return states, actions
