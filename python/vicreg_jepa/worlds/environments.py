"""The worlds as gymnasium environments, single or as a batched VectorEnv.

Importing this module registers `vicreg_jepa/TwoRooms-v0` and `vicreg_jepa/Maze-v0`.

Observations are frames, uint8 [size, size, 2]; actions are in [-1, 1]^2. The reward of a step is 1
if the goal is at most REACHED pixels away, else 0. Episodes end only by truncation, because success
is judged at the end. `info` holds the true state (`World.facts`), `distance` (Euclidean, to the
goal) and `success`; the info of a reset also holds `goal`, the frame with the dot at the goal.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vicreg_jepa.worlds.named import WORLDS, named
from vicreg_jepa.worlds.pictures import painted
from vicreg_jepa.worlds.world import ACTIONS, CHANNELS, STEPS, State, World

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise ImportError(
        "environments need gymnasium: pip install 'vicreg-kernels[worlds]'"
    ) from error

METADATA: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}
Frames = NDArray[np.uint8]


def spaces_of(world: World) -> tuple[spaces.Box, spaces.Box]:
    """The spaces of observations and actions of one environment."""
    shape = (world.size, world.size, CHANNELS)
    return spaces.Box(0, 255, shape, np.uint8), spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)


def infos(world: World, state: State, reset: bool) -> dict[str, NDArray[Any]]:
    """The contents of `info` for N environments, each [N, ...]."""
    contents = {
        **world.facts(state),
        "distance": world.from_goal(state),
        "success": world.success(state),
    }
    if reset:
        contents["goal"] = world.render(world.at(state, state.goal))
    # Copies, because callers may write to them.
    return {name: value.numpy().copy() for name, value in contents.items()}


class WorldEnv(gymnasium.Env[Frames, NDArray[np.float32]]):
    """One environment. world: its name; settings: its settings. `reset(seed=s)` begins the episode
    with seed s of the world; later resets without a seed draw their seeds from a generator seeded
    with s.
    """

    metadata: ClassVar[dict[str, Any]] = METADATA

    def __init__(self, world: str, render_mode: str | None = None, **settings: Any) -> None:
        self.world = named(world, **settings)
        self.observation_space, self.action_space = spaces_of(self.world)
        self.render_mode = _mode(render_mode)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frames, dict[str, Any]]:
        super().reset(seed=seed)
        begun = int(self.np_random.integers(2**62)) if seed is None else seed
        self.state = self.world.reset(torch.tensor([begun]))
        return self._frame(), self._info(reset=True)

    def step(self, action: NDArray[np.float32]) -> tuple[Frames, float, bool, bool, dict[str, Any]]:
        self.state = self.world.step(self.state, _actions(action, (ACTIONS,))[None])
        info = self._info(reset=False)
        return self._frame(), float(info["success"]), False, False, info

    def render(self) -> Any:
        return None if self.render_mode is None else painted(self.world, self.state)[0]

    def _frame(self) -> Frames:
        return self.world.render(self.state)[0].numpy()

    def _info(self, reset: bool) -> dict[str, Any]:
        return {name: value[0] for name, value in infos(self.world, self.state, reset).items()}


class WorldVectorEnv(VectorEnv[NDArray[np.uint8], NDArray[np.float32], NDArray[Any]]):
    """num_envs environments, stepped as one batch. A truncated environment is reset by the next
    step, which ignores its action (gymnasium's AutoresetMode.NEXT_STEP).
    """

    metadata: ClassVar[dict[str, Any]] = {
        **METADATA,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        world: str,
        num_envs: int = 1,
        max_episode_steps: int = STEPS,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs: got {num_envs}, takes an integer from 1")
        if max_episode_steps < 1:
            raise ValueError(f"max_episode_steps: got {max_episode_steps}, takes one from 1")
        self.world, self.num_envs, self.steps = (
            named(world, **settings),
            num_envs,
            max_episode_steps,
        )
        self.single_observation_space, self.single_action_space = spaces_of(self.world)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = _mode(render_mode)

    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Frames, dict[str, Any]]:
        """seed: an integer s, for the seeds s, s + 1, ..., or a list with one seed each."""
        super().reset(seed=seed if isinstance(seed, int) else None)
        drawn = self._drawn()
        if isinstance(seed, int):
            drawn = seed + torch.arange(self.num_envs)
        elif seed is not None:
            if len(seed) != self.num_envs:
                raise ValueError(f"seed: got {len(seed)} seeds, takes {self.num_envs}")
            for place, one in enumerate(seed):
                drawn[place] = drawn[place] if one is None else one
        self.state = self.world.reset(drawn)
        self.ended = np.zeros(self.num_envs, dtype=np.bool_)
        return self.world.render(self.state).numpy(), self._infos(np.ones_like(self.ended))

    def step(
        self, actions: NDArray[np.float32]
    ) -> tuple[Frames, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        given = _actions(actions, (self.num_envs, ACTIONS))
        begun = self.ended
        self.state = self.world.step(self.state, given)
        if begun.any():
            self.state = self.world.reset(self._drawn()).where(torch.from_numpy(begun), self.state)
        info = self._infos(begun)
        reward = (info["success"] & ~begun).astype(np.float64)
        self.ended = (self.state.time >= self.steps).numpy()
        frames = self.world.render(self.state).numpy()
        return frames, reward, np.zeros_like(begun), self.ended.copy(), info

    def render(self) -> Any:
        return None if self.render_mode is None else tuple(painted(self.world, self.state))

    def _drawn(self) -> Tensor:
        return torch.from_numpy(self.np_random.integers(2**62, size=self.num_envs))

    def _infos(self, begun: NDArray[np.bool_]) -> dict[str, Any]:
        contents: dict[str, Any] = infos(self.world, self.state, bool(begun.any()))
        masks = {name: begun if name == "goal" else np.ones_like(begun) for name in contents}
        return {**contents, **{f"_{name}": mask for name, mask in masks.items()}}


def _mode(render_mode: str | None) -> str | None:
    if render_mode not in (None, *METADATA["render_modes"]):
        raise ValueError(f"render_mode: got {render_mode!r}, takes None or rgb_array")
    return render_mode


def _actions(action: Any, shape: tuple[int, ...]) -> Tensor:
    given = torch.as_tensor(np.asarray(action, dtype=np.float32))
    if tuple(given.shape) != shape:
        raise ValueError(f"action: got shape {list(given.shape)}, takes {list(shape)}")
    return given


for one in WORLDS:
    gymnasium.register(
        id=f"vicreg_jepa/{one}-v0",
        entry_point=WorldEnv,
        vector_entry_point=WorldVectorEnv,
        max_episode_steps=STEPS,
        kwargs={"world": one},
    )
