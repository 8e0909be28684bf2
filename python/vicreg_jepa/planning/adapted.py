"""Planning in gymnasium environments of other packages, which an Adapter with a task makes frames
and goals of.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vicreg_jepa.planning import checks
from vicreg_jepa.planning.control import Control, Plans, check_seeds
from vicreg_jepa.planning.energies import EnergyLike
from vicreg_jepa.planning.model import LatentModel
from vicreg_jepa.worlds.adapter import Adapter
from vicreg_jepa.worlds.policies import walk_actions

Make = Callable[[], Adapter]
Policy = Callable[[Adapter, int, int], NDArray[np.float32]]  # (adapter, seed, step) -> action [A]
WALKS, WALKED = 32, 16  # walks, and their steps, that measure the length of a step


@dataclass(frozen=True)
class Played:
    """N episodes of T steps. success: bool [N], at the last step. frames: uint8 [N, T + 1, H, W, C]
    after each step; an episode that has ended repeats its last one. goals: uint8 [N, H, W, C].
    """

    success: Tensor
    frames: Tensor
    goals: Tensor


def _played(
    environments: list[Adapter],
    frames: list[NDArray[np.uint8]],
    steps: int,
    act: Callable[[int, Tensor], NDArray[np.float32]],
) -> Played:
    """Run environments that have just begun, then close them; act: from a step and the frames
    [N, H, W, C] to the actions [N, A].
    """
    goals = torch.from_numpy(np.stack([one.goal() for one in environments]))
    seen = [torch.from_numpy(np.stack(frames))]
    ended = [False] * len(environments)
    for step in range(steps):
        actions = act(step, seen[-1])
        now = seen[-1].clone()
        for number, one in enumerate(environments):
            if not ended[number]:
                result = one.step(actions[number])
                now[number], ended[number] = torch.from_numpy(result.frame), result.ended
        seen.append(now)
    success = torch.tensor([one.success() for one in environments])
    for one in environments:
        one.close()
    return Played(success, torch.stack(seen, dim=1), goals)


def episodes(
    model: LatentModel,
    make: Make,
    planner: Plans,
    seeds: Tensor,
    near: float,
    steps: int,
    energy: Callable[[Tensor], EnergyLike] | None = None,
) -> tuple[Played, Control]:
    """Plan in one environment for each seed, int64 [N], with a plan every `interval` steps. An
    environment that ends early keeps its last state. near: a plan has arrived within this distance
    of the goal's latents. energy: a function of the goal's latents [N, D]; by default the
    planner's own.
    """
    check_seeds(seeds)
    checks.number("near", near, open_low=True)
    checks.whole("steps", steps, 1)
    environments = [make() for _ in seeds]
    frames = [one.reset(int(seed)).frame for one, seed in zip(environments, seeds, strict=True)]
    with torch.no_grad():
        goal = model.encode(torch.from_numpy(np.stack([one.goal() for one in environments])))
        control = Control(model, planner, seeds, goal, near, energy, keep=False)

        def act(step: int, seen: Tensor) -> NDArray[np.float32]:
            return control.action(step, lambda: model.encode(seen)).numpy()

        return _played(environments, frames, steps, act), control


def followed(make: Make, policy: Policy, seeds: Tensor, steps: int) -> Played:
    """Run the episodes of a policy, with which planning is compared."""
    check_seeds(seeds)
    environments = [make() for _ in seeds]
    frames = [one.reset(int(seed)).frame for one, seed in zip(environments, seeds, strict=True)]

    def act(step: int, seen: Tensor) -> NDArray[np.float32]:
        return np.stack(
            [policy(one, int(seed), step) for one, seed in zip(environments, seeds, strict=True)]
        )

    return _played(environments, frames, steps, act)


def walk(adapter: Adapter, seed: int, step: int) -> NDArray[np.float32]:
    """The random walk that collects trajectories."""
    return walk_actions(torch.tensor([seed]), torch.tensor([step]), adapter.actions)[0].numpy()


def control(name: str) -> Policy:
    """A control of the adapter's task, as a policy."""
    return lambda adapter, seed, step: adapter.control(name)


def step_length(model: LatentModel, make: Make, collection: int) -> float:
    """The mean distance between the latents of consecutive frames of random walks."""
    lengths = []
    with closing(make()) as one, torch.no_grad():
        for episode in one.play("walk", collection, WALKS, WALKED):
            path = model.encode(torch.from_numpy(episode.frames))
            lengths.append(torch.linalg.vector_norm(path[1:] - path[:-1], dim=1))
    return float(torch.cat(lengths).mean())
