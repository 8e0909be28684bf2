"""A maze of which the dot sees a window around itself: the rest of the map is out of view."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vicreg_jepa.worlds import draws, paths
from vicreg_jepa.worlds.draws import Stream
from vicreg_jepa.worlds.maze import FIRST, PITCH, ROOM, Maze
from vicreg_jepa.worlds.world import State, World, disc

HALF = 2  # a thing is a square of 2 HALF + 1 pixels


@dataclass(frozen=True)
class MazeWindow(World):
    """A Maze whose frames are a window of a third of the map's side, so of a ninth of its area:
    4 * cells + 1 of 12 * cells + 3 pixels, with the dot in its middle. What lies beyond the map is
    wall.

    things: a number of cells, different ones, hold a thing: a square of 5 pixels in the middle of
    the cell, in the channel of the dot. The dot moves over it. layout: int64 [N, cells, cells, 3],
    that of Maze and, last, 1 where there is a thing.
    """

    cells: int = 8
    things: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.maze.cells**2
        if isinstance(self.things, bool) or not isinstance(self.things, int):
            raise ValueError(f"things: got {self.things!r}, takes an integer")
        if not 0 <= self.things <= most:
            raise ValueError(f"things: got {self.things}, takes 0 to {most}, the number of cells")

    @cached_property
    def maze(self) -> Maze:
        """The maze, with frames of the whole map. Raises ValueError for bad settings."""
        return Maze(noise=self.noise, cells=self.cells)

    @property
    def size(self) -> int:
        return self.maze.size // 3

    @property
    def layout_shape(self) -> tuple[int, ...]:
        return (self.cells, self.cells, 3)

    def reset(self, seeds: Tensor) -> State:
        state = self.maze.reset(seeds)
        order = draws.uniform(seeds, Stream.THINGS, 0, self.cells**2).argsort(dim=1, stable=True)
        things = torch.zeros_like(order).scatter_(1, order[:, : self.things], 1)
        things = things.view(-1, self.cells, self.cells, 1)
        return state._replace(layout=torch.cat([state.layout, things], dim=3))

    def free(self, position: Tensor, layout: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        return self.maze.free(position, layout, axis)

    def inside(self, position: Tensor, layout: Tensor) -> Tensor:
        return self.maze.inside(position, layout[..., :2])

    def walls(self, layout: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the whole map."""
        return self.maze.walls(layout)

    def facts(self, state: State) -> dict[str, Tensor]:
        """Those of Maze, and things: bool [N, cells, cells], by row and column."""
        return {**self.maze.facts(self._of_maze(state)), "things": state.layout[..., 2] > 0}

    def expert(self, state: State) -> Tensor:
        return self.maze.expert(state)

    def portals(self, state: State) -> list[list[paths.Portal]]:
        return self.maze.portals(self._of_maze(state))

    def map(self, state: State) -> Tensor:
        """The whole map, which the dot does not see: uint8 [N, 3 * size, 3 * size, 2]."""
        pixel = torch.arange(self.maze.size, device=state.position.device)
        return self._drawn(state, pixel.expand(len(state.position), 2, -1))

    def render(self, state: State) -> Tensor:
        """uint8 [N, size, size, 2]: the window around the dot; its middle pixel has the dot's
        centre. The dot and the things, and the walls, 0 or 255.
        """
        steps = torch.arange(self.size, device=state.position.device) - self.size // 2
        return self._drawn(state, state.position.floor().long()[:, :, None] + steps)

    def _drawn(self, state: State, places: Tensor) -> Tensor:
        """uint8 [N, S, S, 2] of the pixels in the columns and rows `places`, int64 [N, 2, S]."""
        x, y = places.clamp(0, self.maze.size - 1).unbind(1)
        out_x, out_y = ((places < 0) | (places >= self.maze.size)).unbind(1)
        rows, which = self.maze.walls(state.layout)
        kinds = rows.shape[1]
        rows = rows.gather(2, x[:, None].expand(-1, kinds, -1)) | out_x[:, None]
        walls = _lines(rows, which.gather(1, y)) | out_y[:, :, None]
        first = int(FIRST + ROOM / 2) - HALF
        cell = (places - first).div(PITCH, rounding_mode="floor").clamp(0, self.cells - 1)
        inside = (places - first - PITCH * cell >= 0) & (places - first - PITCH * cell <= 2 * HALF)
        (column, row), (in_column, in_row) = cell.unbind(1), inside.unbind(1)
        things = (state.layout[..., 2] > 0).gather(2, column[:, None].expand(-1, self.cells, -1))
        none = things.new_zeros(len(x), 1, x.shape[1])
        table = torch.cat([things & in_column[:, None], none], dim=1)
        frames = _lines(table, torch.where(in_row, row, self.cells)).to(torch.uint8) * 255
        dot = self._dot(state.position, places)
        return torch.stack([torch.maximum(frames, dot), walls.to(torch.uint8) * 255], dim=3)

    def _dot(self, position: Tensor, places: Tensor) -> Tensor:
        """uint8 [N, S, S]: the dot alone."""
        count, size = len(places), places.shape[2]
        (x, y), values = disc(position)
        x, y = x - places[:, 0, :1], y - places[:, 1, :1]  # in this picture
        where = (y[:, :, None] * size + x[:, None, :]).flatten(1)
        frames = torch.zeros(count, size * size, dtype=torch.uint8, device=position.device)
        return frames.scatter_(1, where, values.flatten(1)).view(count, size, size)

    def in_view(self, state: State, place: Tensor) -> Tensor:
        """bool [N]: whether a place [N, 2] is inside the window."""
        offset = place - state.position.floor() + self.size // 2
        return ((offset >= 0) & (offset < self.size)).all(dim=1)

    def _of_maze(self, state: State) -> State:
        return state._replace(layout=state.layout[..., :2])


def _lines(rows: Tensor, which: Tensor) -> Tensor:
    """[N, L, S]: of rows [N, K, S] those of the numbers `which`, int64 [N, L]."""
    kinds = rows.shape[1]
    which = which + kinds * torch.arange(len(rows), device=rows.device)[:, None]
    return rows.flatten(0, 1).index_select(0, which.flatten()).unflatten(0, which.shape)
