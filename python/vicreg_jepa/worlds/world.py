"""The base class of the worlds: the state, the dynamics and the rendering.

Lengths are in pixels of the image, x to the right and y down; pixel i covers [i, i + 1). For
contact with walls the dot is a square of 2 RADIUS pixels; in the image it is a disc of that width.
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
SPEED = 2.0  # an action of 1 moves the dot so many pixels along its axis
REACHED = 4.0  # success: the dot is at most so far from the goal; across a wall it is 7 or more
MOST_NOISE = 1.0
STEPS = 200  # the length of an episode; success is judged at its end
ACTIONS = 2
CHANNELS = 2  # the dot, the walls


class State(NamedTuple):
    """The state of N environments. position, goal: float32 [N, 2], (x, y) of the dot's centre;
    layout: int64 [N, ...], the places of the walls; seed, time: int64 [N], which determine all
    random numbers.
    """

    position: Tensor
    goal: Tensor
    layout: Tensor
    seed: Tensor
    time: Tensor

    def rows(self, which: Any) -> State:
        """Select environments by a slice, a mask or indices."""
        return State(*(field[which] for field in self))

    def where(self, which: Tensor, other: State) -> State:
        """Take the environments of self where the mask [N] is true, those of `other` elsewhere."""
        return State(
            *(
                torch.where(which.view(-1, *(1,) * (mine.dim() - 1)), mine, its)
                for mine, its in zip(self, other, strict=True)
            )
        )


def disc(position: Tensor) -> tuple[Tensor, Tensor]:
    """The dot's picture, anti-aliased, for positions [N, 2] of its centre: (int64 [2, N, 7], the
    columns and the rows of its pixels; uint8 [N, 7, 7], their values by row and column).
    """
    reach = RADIUS + 1
    start = position.floor().long() - reach
    places = start.T[:, :, None] + torch.arange(2 * reach + 1, device=start.device)
    off = (places + 0.5 - position.T[:, :, None]).square()
    distance = torch.sqrt(off[0, :, None, :] + off[1, :, :, None])
    return places, (255 * (RADIUS + 0.5 - distance).clamp(0, 1)).round().to(torch.uint8)


@dataclass(frozen=True)
class World(ABC):
    """A world: its fields are its settings, its methods work on N environments at once.

    noise: in pixels; each step adds a uniform number in [-noise, noise] to each coordinate.
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
        """The image has size x size pixels."""

    @property
    @abstractmethod
    def layout_shape(self) -> tuple[int, ...]:
        """The shape of the layout of one environment."""

    @abstractmethod
    def reset(self, seeds: Tensor) -> State:
        """The first states of episodes. Each depends only on its own seed; seeds: int64 [N]."""

    @abstractmethod
    def free(self, position: Tensor, layout: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """([N], [N]): the lowest and highest coordinate that the dot can reach along an axis (0:
        x, 1: y) from a valid position, by a move of at most SPEED + MOST_NOISE.
        """

    @abstractmethod
    def inside(self, position: Tensor, layout: Tensor) -> Tensor:
        """bool [N]: whether a position [N, 2] of the dot's centre is valid (overlaps no wall)."""

    @abstractmethod
    def walls(self, layout: Tensor) -> tuple[Tensor, Tensor]:
        """The image of the walls, as K distinct rows: bool [N, K, size], true on a wall, and int64
        [N, size], the number of the row that each line of the image shows.
        """

    @abstractmethod
    def facts(self, state: State) -> dict[str, Tensor]:
        """The true state by name, each [N, ...]: the targets of probes."""

    @abstractmethod
    def expert(self, state: State) -> Tensor:
        """Actions [N, 2] of an expert that knows the true state."""

    @abstractmethod
    def portals(self, state: State) -> list[list[paths.Portal]]:
        """For each environment the openings that every path to the goal crosses, in order."""

    def step(self, state: State, action: Tensor) -> State:
        """The next states. action: float [N, 2], clamped to [-1, 1].

        The dot moves by SPEED * action + noise, first along x, then along y, each time until it
        meets a wall: its path is the corner of these two moves, not the diagonal. Raises ValueError
        if the action has another shape or is not finite.
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
        """The contact with walls: positions [N, 2] after a displacement `push` [N, 2] of at most
        SPEED + MOST_NOISE along each axis.
        """
        for axis in (0, 1):
            low, high = self.free(position, layout, axis)
            place = (position[:, axis] + push[:, axis]).clamp(low, high)
            other = position[:, 1 - axis]
            position = torch.stack([place, other] if axis == 0 else [other, place], dim=1)
        return position

    def render(self, state: State) -> Tensor:
        """uint8 [N, size, size, 2]: the dot, anti-aliased, and the walls, 0 or 255."""
        count, size = len(state.position), self.size
        rows, which = self.walls(state.layout)
        kinds = rows.shape[1]
        table = rows.new_zeros((count, kinds, size, CHANNELS), dtype=torch.uint8)
        table[..., 1] = rows.view(torch.uint8) * 255
        which = which + kinds * torch.arange(count, device=rows.device)[:, None]
        frames = table.view(count * kinds, -1).index_select(0, which.flatten())
        (x, y), values = disc(state.position)
        where = (y[:, :, None] * size + x[:, None, :]) * CHANNELS
        frames = frames.view(count, -1).scatter_(1, where.flatten(1), values.flatten(1))
        return frames.view(count, size, size, CHANNELS)

    def at(self, state: State, position: Tensor) -> State:
        """The state with the dot at another position, for example at the goal. Raises ValueError
        if a position is not valid.
        """
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
        """float32 [N]: the Euclidean distance to the goal."""
        return torch.linalg.vector_norm(state.position - state.goal, dim=1)

    def success(self, state: State) -> Tensor:
        """bool [N]: whether the goal is at most REACHED pixels away."""
        return self.from_goal(state) <= REACHED

    def way(self, state: State) -> list[list[paths.Point]]:
        """For each environment the vertices of the shortest path to the goal, with both ends."""
        starts, goals = state.position.tolist(), state.goal.tolist()
        return [
            paths.taut((x, y), portals, (goal_x, goal_y))
            for (x, y), portals, (goal_x, goal_y) in zip(
                starts, self.portals(state), goals, strict=True
            )
        ]

    def distance(self, state: State) -> Tensor:
        """float64 [N]: the length of the shortest path to the goal."""
        return torch.tensor([paths.length(way) for way in self.way(state)], dtype=torch.float64)

    def straight(self, state: State) -> Tensor:
        """Actions [N, 2] straight towards the goal, also through walls."""
        return towards(state.position, state.goal)

    def settings(self) -> dict[str, Any]:
        return asdict(self)


def towards(position: Tensor, target: Tensor) -> Tensor:
    """Actions [N, 2] in the direction of the target, at full speed, that do not pass it."""
    way = target - position
    return way / way.abs().amax(dim=1, keepdim=True).clamp(min=SPEED)
