"""An adapter for gymnasium environments of other packages: frames, and actions in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vicreg_jepa.worlds.episodes import Episode, episode_seed
from vicreg_jepa.worlds.policies import BLIND

Frame = Callable[[Any, dict[str, Any]], NDArray[np.uint8]]
States = Callable[[Any, dict[str, Any]], dict[str, Any]]


class Adapter:
    """A gymnasium.Env with continuous actions, as a source of frames and episodes.

    env: its action space is a bounded Box of one dimension. frame: None, if the observation is the
    image; the name of the image in a dict observation; or a function of (observation, info) that
    draws the frame, for example with a `Raster`. states: a function of (observation, info) that
    returns the true state by name. Frames are uint8 [H, W, C]. Raises ValueError if the spaces do
    not fit.
    """

    def __init__(
        self, env: Any, frame: str | Frame | None = None, states: States | None = None
    ) -> None:
        space = env.action_space
        low, high = getattr(space, "low", None), getattr(space, "high", None)
        if low is None or high is None or low.ndim != 1 or not np.isfinite(high - low).all():
            raise ValueError(f"env: got actions {space}, takes a bounded Box of one dimension")
        self.env, self.actions, self.kind = env, len(low), space.dtype
        self.middle, self.half = (high + low) / 2.0, (high - low) / 2.0
        self.states = states
        self.frame = frame if callable(frame) else _taken(env.observation_space, frame)

    def reset(self, seed: int) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """(frame, true state) at the start of an episode."""
        return self._seen(*self.env.reset(seed=seed))

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[NDArray[np.uint8], dict[str, Any], float, bool]:
        """(frame, true state, reward, whether the episode ended) after an action, which is clamped
        to [-1, 1]. Raises ValueError if the action has another shape or is not finite.
        """
        if np.shape(action) != (self.actions,):
            raise ValueError(f"action: got shape {np.shape(action)}, takes {(self.actions,)}")
        if not np.isfinite(action).all():
            raise ValueError("action: got values that are not finite, takes [-1, 1]")
        scaled = self.middle + self.half * np.clip(action, -1, 1)
        observation, reward, terminated, truncated, info = self.env.step(scaled.astype(self.kind))
        frame, states = self._seen(observation, info)
        return frame, states, float(reward), bool(terminated or truncated)

    def play(
        self, policy: str, seed: int, episodes: int, length: int, first: int = 0
    ) -> Iterator[Episode]:
        """Simulate `episodes` episodes of a seed, from number `first`, with the policy `walk` or
        `uniform`. An episode ends after `length` actions, or when the environment ends it.
        """
        if policy not in BLIND:
            raise ValueError(f"policy: got {policy!r}, takes {' or '.join(BLIND)}")
        for number in range(first, first + episodes):
            drawn = torch.tensor([episode_seed(seed, number)]).expand(length)
            actions = BLIND[policy](drawn, torch.arange(length), self.actions).numpy()
            its_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            frame, state = self.reset(its_seed)
            frames, states, rewards = [frame], [state], []
            for action in actions:
                frame, state, reward, ended = self.step(action)
                frames.append(frame)
                states.append(state)
                rewards.append(reward)
                if ended:
                    break
            yield Episode(
                np.stack(frames),
                actions[: len(rewards)],
                {name: np.stack([state[name] for state in states]) for name in states[0]},
                {"seed": its_seed, "rewards": rewards},
            )

    def _seen(
        self, observation: Any, info: dict[str, Any]
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        frame = np.array(self.frame(observation, info))  # a copy: some environments reuse the array
        if frame.dtype != np.uint8 or frame.ndim != 3:
            raise ValueError(f"frame: got {frame.dtype} {list(frame.shape)}, takes uint8 [H, W, C]")
        found = {} if self.states is None else self.states(observation, info)
        return frame, {name: np.array(value) for name, value in found.items()}


def _taken(space: Any, name: str | None) -> Frame:
    """A function that takes the image out of an observation of this space."""
    if name is not None:
        entries = getattr(space, "spaces", {})
        if name not in entries:
            raise ValueError(f"frame: got {name!r}, takes one of {list(entries)} or a function")
        space = entries[name]
    if getattr(space, "dtype", None) != np.uint8 or len(space.shape) != 3:
        raise ValueError(
            f"frame: got the observation {space}, takes an image, uint8 [H, W, C]; of others the "
            "name of an entry, or a function that draws"
        )
    return lambda observation, info: observation if name is None else observation[name]


@dataclass(frozen=True)
class Raster:
    """Draws a position as an anti-aliased disc, and walls, as in the images of the worlds.

    low, high: the corners (x, y) of the part of the plane that the image shows, y upwards; walls:
    bool [rows, columns], the upper row first, scaled to the size of the image.
    """

    low: Sequence[float]
    high: Sequence[float]
    size: int = 64
    radius: float = 2.0
    walls: NDArray[np.bool_] | None = None

    def __call__(self, position: Sequence[float] | NDArray[Any]) -> NDArray[np.uint8]:
        """uint8 [size, size, 2]: the disc, the walls."""
        frame = np.zeros((self.size, self.size, 2), dtype=np.uint8)
        if self.walls is not None:
            cell_rows, cell_columns = (
                np.arange(self.size) * count // self.size for count in self.walls.shape
            )
            frame[..., 1] = 255 * self.walls[np.ix_(cell_rows, cell_columns)]
        x, y = (
            self.size * (place - low) / (high - low)
            for place, low, high in zip(position, self.low, self.high, strict=True)
        )
        middle = np.arange(self.size) + 0.5
        distance = np.hypot(middle[None, :] - x, middle[:, None] - (self.size - y))
        frame[..., 0] = np.round(255 * np.clip(self.radius + 0.5 - distance, 0, 1))
        return frame


def point_maze(env: Any, size: int = 64) -> Adapter:
    """PointMaze of gymnasium-robotics, drawn from its position and map, without MuJoCo's renderer.

    states: position and velocity.
    """
    maze = env.unwrapped.maze
    walls = np.array([[cell == 1 for cell in row] for row in maze.maze_map])
    half = maze.maze_size_scaling * np.array(walls.shape[::-1]) / 2.0
    raster = Raster(-half, half, size, walls=walls)

    def drawn(observation: Any, info: dict[str, Any]) -> NDArray[np.uint8]:
        return raster(observation["achieved_goal"])

    def states(observation: Any, info: dict[str, Any]) -> dict[str, Any]:
        return {
            "position": observation["observation"][:2],
            "velocity": observation["observation"][2:],
        }

    return Adapter(env, drawn, states)
