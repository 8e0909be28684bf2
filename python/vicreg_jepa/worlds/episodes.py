"""Simulates episodes of a world: frames, actions and the true state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vicreg_jepa.worlds.policies import Policy, walk
from vicreg_jepa.worlds.world import State, World

STEPPED = 1024  # environments at once
DRAWN = 16  # of them at once: their frames of 100 steps are 14 MB


@dataclass(frozen=True)
class Episode:
    """An episode of T actions and T + 1 frames.

    frames: uint8 [T + 1, H, W, C]; actions: float32 [T, A]; states: the true state at each frame by
    name, [T + 1, ...]; record: facts about the episode as a whole, which JSON can hold.
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
    """Simulate `episodes` episodes of a seed, from number `first`, of `length` actions each."""
    for start in range(first, first + episodes, STEPPED):
        numbers = range(start, min(start + STEPPED, first + episodes))
        seeds = torch.tensor([episode_seed(seed, number) for number in numbers])
        states, actions = rollout(world, policy, world.reset(seeds), length)
        every, acted = stacked(states), torch.stack(actions, dim=1)
        success = world.success(states[-1])
        for some in torch.arange(len(numbers)).split(DRAWN):
            yield from _drawn(world, every.rows(some), acted[some], success[some])


def _drawn(
    world: World, every: State, acted: torch.Tensor, success: torch.Tensor
) -> Iterator[Episode]:
    """Episodes of states [N, T + 1, ...]; all frames are rendered as one batch."""
    shape = every.seed.shape
    flat = State(*(field.flatten(0, 1) for field in every))
    frames = world.render(flat).unflatten(0, shape)
    facts = {name: fact.unflatten(0, shape) for name, fact in world.facts(flat).items()}
    for place in range(len(frames)):
        record = {
            "seed": int(every.seed[place, 0]),
            "goal": every.goal[place, 0].tolist(),
            "success": bool(success[place]),
        }
        truths = {name: fact[place].numpy() for name, fact in facts.items()}
        yield Episode(frames[place].numpy(), acted[place].numpy(), truths, record)


def rollout(
    world: World, policy: Policy, state: State, steps: int
) -> tuple[list[State], list[torch.Tensor]]:
    """(steps + 1 states, and the clamped actions [N, 2] between them)."""
    states, actions = [state], []
    for _ in range(steps):
        action = policy(world, state).clamp(-1, 1)
        state = world.step(state, action)
        states.append(state)
        actions.append(action)
    return states, actions


def stacked(states: list[State]) -> State:
    """The states of T steps as one, with fields [N, T, ...]."""
    return State(*(torch.stack(field, dim=1) for field in zip(*states, strict=True)))


def walks(world: World, collection: int, count: int, steps: int) -> tuple[State, torch.Tensor]:
    """States [N, steps + 1, ...] and actions [N, steps, A] of random walks, the first `count`
    episodes of a collection.
    """
    seeds = torch.tensor([episode_seed(collection, number) for number in range(count)])
    states, actions = rollout(world, walk, world.reset(seeds), steps)
    return stacked(states), torch.stack(actions, dim=1)
