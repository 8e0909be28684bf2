"""What every world shares: the state, the one function that moves the dot, and its picture.

Lengths are pixels of the picture, x to the right and y down; pixel i covers [i, i + 1). The dot is
a square of 2 RADIUS pixels in its contact with walls, and a disc of that width in the picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_jepa.worlds import draws, paths
from vicreg_jepa.worlds.draws import Stream

RADIUS = 2  # of the dot
THICK = 3  # of every wall
SPEED = 2.0  # pixels that an action of 1 moves along its axis
REACHED = 4.0  # a dot so near to the goal has reached it; walls keep two sides 7 apart
MOST_NOISE = 1.0
STEPS = 200  # of an episode, at whose end success is judged
ACTIONS = 2
CHANNELS = 2  # the dot, the walls


class State(NamedTuple):
    """N environments. position, goal: float32 [N, 2], (x, y) of the dot's centre; layout: int64
    [N, ...], where the walls are; seed, time: int64 [N], of which all that is random is drawn.
    """

    position: Tensor
    goal: Tensor
    layout: Tensor
    seed: Tensor
    time: Tensor

    def rows(self, which: Any) -> State:
        """Some of the environments, by a slice, a mask or indices."""
        return State(*(field[which] for field in self))

    def where(self, which: Tensor, other: State) -> State:
        """These environments where the mask [N] says so, those of `other` elsewhere."""
        return State(
            *(
                torch.where(which.view(-1, *(1,) * (mine.dim() - 1)), mine, its)
                for mine, its in zip(self, other, strict=True)
            )
        )


@dataclass(frozen=True)
class World(ABC):
    """A world's settings and its programs over N environments at once.

    noise: in pixels; every step each coordinate is pushed by a uniform number of [-noise, noise].
    """

    noise: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.noise, bool) or not isinstance(self.noise, int | float):
            raise ValueError(f"noise: got {self.noise!r}, takes a number")
        if not 0 <= self.noise <= MOST_NOISE:
            raise ValueError(f"noise: got {self.noise!r}, takes 0 to {MOST_NOISE} pixels")

    @property
    @abstractmethod
    def size(self) -> int:
        """The picture's edge in pixels."""

    @abstractmethod
    def reset(self, seeds: Tensor) -> State:
        """New episodes, each made from its own seed (int64 [N]) alone."""

    @abstractmethod
    def free(self, position: Tensor, layout: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """([N], [N]): how far low and high the dot may move along an axis (0: x, 1: y) from a
        position where it touches no wall. It holds for moves of at most SPEED + MOST_NOISE.
        """

    @abstractmethod
    def inside(self, position: Tensor, layout: Tensor) -> Tensor:
        """bool [N]: whether the dot's centre may be at position, [N, 2]."""

    @abstractmethod
    def walls(self, layout: Tensor) -> tuple[Tensor, Tensor]:
        """The picture of the walls by its rows, of which many are equal: bool [N, K, size], true
        on a wall, and int64 [N, size], which of the K each row of pixels is.
        """

    @abstractmethod
    def facts(self, state: State) -> dict[str, Tensor]:
        """What is true of the state, by name, each [N, ...]: what probes read."""

    @abstractmethod
    def expert(self, state: State) -> Tensor:
        """Actions [N, 2] that lead to the goal by the true state."""

    @abstractmethod
    def portals(self, state: State) -> list[list[paths.Portal]]:
        """For each environment the openings that every way to the goal passes, in order."""

    def step(self, state: State, action: Tensor) -> State:
        """The next states. action: float [N, 2], clamped to [-1, 1].

        The dot is pushed by SPEED * action + noise, first along x, then along y, each as far as
        no wall is touched: its way is that corner, not the diagonal. Raises ValueError for an
        action that is not finite or not of this shape.
        """
        if action.shape != state.position.shape:
            raise ValueError(
                f"action: got shape {list(action.shape)}, takes {list(state.position.shape)}"
            )
        if not bool(torch.isfinite(action).all()):
            raise ValueError("action: got values that are not finite, takes [-1, 1]")
        push = SPEED * action.to(state.position).clamp(-1, 1)
        if self.noise:
            u = draws.uniform(state.seed, Stream.NOISE, state.time, 2)
            push = push + self.noise * (2 * u - 1)
        return state._replace(
            position=self.moved(state.position, state.layout, push), time=state.time + 1
        )

    def moved(self, position: Tensor, layout: Tensor, push: Tensor) -> Tensor:
        """Contact alone: positions [N, 2] after a push [N, 2] of at most SPEED + MOST_NOISE."""
        for axis in (0, 1):
            low, high = self.free(position, layout, axis)
            place = (position[:, axis] + push[:, axis]).clamp(low, high)
            other = position[:, 1 - axis]
            position = torch.stack([place, other] if axis == 0 else [other, place], dim=1)
        return position

    def render(self, state: State) -> Tensor:
        """uint8 [N, size, size, 2]: the dot, whose edge is smooth, and the walls, 0 or 255."""
        count, size = len(state.position), self.size
        rows, which = self.walls(state.layout)
        kinds = rows.shape[1]
        table = rows.new_zeros((count, kinds, size, CHANNELS), dtype=torch.uint8)
        table[..., 1] = rows.view(torch.uint8) * 255
        which = which + kinds * torch.arange(count, device=rows.device)[:, None]
        frames = table.view(count * kinds, -1).index_select(0, which.flatten())
        reach = RADIUS + 1
        start = state.position.floor().long() - reach  # [N, 2]
        places = start[:, :, None] + torch.arange(2 * reach + 1, device=start.device)  # [N, 2, 7]
        off = places + 0.5 - state.position[:, :, None]
        distance = torch.sqrt(off[:, 0, None, :] ** 2 + off[:, 1, :, None] ** 2)  # [N, y, x]
        cover = (RADIUS + 0.5 - distance).clamp(0, 1)
        where = (places[:, 1, :, None] * size + places[:, 0, None, :]) * CHANNELS
        values = (255 * cover).round().to(torch.uint8)
        frames = frames.view(count, -1).scatter_(1, where.flatten(1), values.flatten(1))
        return frames.view(count, size, size, CHANNELS)

    def at(self, state: State, position: Tensor) -> State:
        """The dot put elsewhere, as to draw the goal. Raises ValueError inside of a wall."""
        position = position.to(state.position)
        outside = ~self.inside(position, state.layout)
        if bool(outside.any()):
            number = int(outside.nonzero()[0, 0])
            raise ValueError(
                f"position: got {position[number].tolist()} in environment {number}, which touches "
                "a wall"
            )
        return state._replace(position=position)

    def from_goal(self, state: State) -> Tensor:
        """float32 [N]: the straight distance to the goal."""
        return torch.linalg.vector_norm(state.position - state.goal, dim=1)

    def success(self, state: State) -> Tensor:
        """bool [N]: the goal is at most REACHED pixels away."""
        return self.from_goal(state) <= REACHED

    def way(self, state: State) -> list[list[paths.Point]]:
        """For each environment the corners of the shortest way to the goal, both ends included."""
        starts, goals = state.position.tolist(), state.goal.tolist()
        return [
            paths.taut((x, y), portals, (goal_x, goal_y))
            for (x, y), portals, (goal_x, goal_y) in zip(
                starts, self.portals(state), goals, strict=True
            )
        ]

    def distance(self, state: State) -> Tensor:
        """float64 [N]: the length of the shortest way to the goal that touches no wall."""
        return torch.tensor([paths.length(way) for way in self.way(state)], dtype=torch.float64)

    def straight(self, state: State) -> Tensor:
        """Actions [N, 2] straight at the goal, whatever stands between."""
        return towards(state.position, state.goal)

    def settings(self) -> dict[str, Any]:
        return asdict(self)


def towards(position: Tensor, target: Tensor) -> Tensor:
    """Actions [N, 2] in the direction of target; as fast as may be, and no further than it."""
    way = target - position
    return way / way.abs().amax(dim=1, keepdim=True).clamp(min=SPEED)
