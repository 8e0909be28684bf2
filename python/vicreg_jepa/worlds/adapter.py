"""An adapter for gymnasium environments of other packages: frames, and actions in [-1, 1]."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vicreg_jepa.worlds.episodes import Episode, episode_seed
from vicreg_jepa.worlds.policies import BLIND

Frame = Callable[[Any, dict[str, Any]], NDArray[np.uint8]]
States = Callable[[Any, dict[str, Any]], dict[str, Any]]
Controller = Callable[[Any, dict[str, Any]], NDArray[np.float32]]


@dataclass(frozen=True)
class Task:
    """The task of an environment. All fields are functions of (observation, info).

    goal: the frame at the goal. success: whether the goal is reached. controls: policies that
    plans are compared with, by name, each with actions [A] in [-1, 1].
    """

    goal: Frame
    success: Callable[[Any, dict[str, Any]], bool]
    controls: dict[str, Controller] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """The result of a reset or a step. frame: uint8 [H, W, history * C]; states: the true state by
    name; reward: the sum over the step, 0 after a reset; ended: whether the episode has ended.
    """

    frame: NDArray[np.uint8]
    states: dict[str, NDArray[Any]]
    reward: float = 0.0
    ended: bool = False


class Adapter:
    """A gymnasium.Env with continuous actions, as a source of frames and episodes.

    env: its action space is a bounded Box of one dimension. frame: None, if the observation is the
    image; the name of the image in a dict observation; or a function of (observation, info) that
    draws the frame, for example with a `Raster`. states: a function of (observation, info) that
    returns the true state by name. task: what plans must reach. history: the number of
    last frames that are stacked along the channels, the newest last; two show the velocity of what
    moves. repeat: the steps of env for which an action is held; frames between them are not seen.

    Frames are uint8 [H, W, history * C]. Raises ValueError if the spaces do not fit.
    """

    def __init__(
        self,
        env: Any,
        frame: str | Frame | None = None,
        states: States | None = None,
        task: Task | None = None,
        history: int = 1,
        repeat: int = 1,
    ) -> None:
        space = env.action_space
        low, high = getattr(space, "low", None), getattr(space, "high", None)
        if low is None or high is None or low.ndim != 1 or not np.isfinite(high - low).all():
            raise ValueError(f"env: got actions {space}, takes a bounded Box of one dimension")
        for name, value in (("history", history), ("repeat", repeat)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, takes an integer from 1")
        self.env, self.actions, self.kind = env, len(low), space.dtype
        self.middle, self.half = (high + low) / 2.0, (high - low) / 2.0
        self.states, self.task, self.repeat = states, task, repeat
        self.frame = frame if callable(frame) else _taken(env.observation_space, frame)
        self.frames: deque[NDArray[np.uint8]] = deque(maxlen=history)
        self.observed: tuple[Any, dict[str, Any]] = (None, {})

    def reset(self, seed: int) -> Seen:
        """Begin an episode; the frames before the first are taken to be like it."""
        self.frames.clear()
        return self._seen(*self.env.reset(seed=seed))

    def step(self, action: NDArray[np.float32]) -> Seen:
        """Hold an action, clamped to [-1, 1], for `repeat` steps, or until the episode ends. Raises
        ValueError if the action has another shape or is not finite.
        """
        if np.shape(action) != (self.actions,):
            raise ValueError(f"action: got shape {np.shape(action)}, takes {(self.actions,)}")
        if not np.isfinite(action).all():
            raise ValueError("action: got values that are not finite, takes [-1, 1]")
        scaled = (self.middle + self.half * np.clip(action, -1, 1)).astype(self.kind)
        total = 0.0
        for _ in range(self.repeat):
            observation, reward, terminated, truncated, info = self.env.step(scaled)
            total += float(reward)
            if terminated or truncated:
                break
        return self._seen(observation, info, total, bool(terminated or truncated))

    def goal(self) -> NDArray[np.uint8]:
        """The frame at the goal of an episode that has just been reset, at rest. Raises ValueError
        without a task.
        """
        frame = _image(self._task().goal(*self.observed))
        return np.concatenate([frame] * (self.frames.maxlen or 1), axis=2)

    def success(self) -> bool:
        """Whether the goal is reached now. Raises ValueError without a task."""
        return bool(self._task().success(*self.observed))

    def control(self, name: str) -> NDArray[np.float32]:
        """The action [A] of a policy of the task in what is seen now."""
        return np.asarray(self._task().controls[name](*self.observed), dtype=np.float32)

    def close(self) -> None:
        """Close the environment: some hold windows or simulators."""
        self.env.close()

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
            its_seed = seed_of(seed, number)
            every = [self.reset(its_seed)]
            for action in actions:
                every.append(self.step(action))
                if every[-1].ended:
                    break
            yield Episode(
                np.stack([seen.frame for seen in every]),
                actions[: len(every) - 1],
                {name: np.stack([seen.states[name] for seen in every]) for name in every[0].states},
                {"seed": its_seed, "rewards": [seen.reward for seen in every[1:]]},
            )

    def _task(self) -> Task:
        if self.task is None:
            raise ValueError(f"task: got None for {self.env}, takes a Task that has a goal")
        return self.task

    def _seen(
        self, observation: Any, info: dict[str, Any], reward: float = 0.0, ended: bool = False
    ) -> Seen:
        self.observed = observation, info
        frame = _image(self.frame(observation, info))
        while len(self.frames) < (self.frames.maxlen or 1) - 1:
            self.frames.append(frame)
        self.frames.append(frame)
        states = {} if self.states is None else self.states(observation, info)
        return Seen(
            np.concatenate(self.frames, axis=2),
            {name: np.array(value) for name, value in states.items()},
            reward,
            ended,
        )


def seed_of(seed: int, number: int) -> int:
    """The seed that episode `number` of a collection gives to the environment."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _image(frame: Any) -> NDArray[np.uint8]:
    copied = np.array(frame)  # some environments reuse the array
    if copied.dtype != np.uint8 or copied.ndim != 3:
        raise ValueError(f"frame: got {copied.dtype} {list(copied.shape)}, takes uint8 [H, W, C]")
    return copied


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
