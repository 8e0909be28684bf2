"""A maze of square cells, with exactly one path between any two cells."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vicreg_jepa.worlds import draws, paths
from vicreg_jepa.worlds.draws import Stream
from vicreg_jepa.worlds.world import RADIUS, THICK, State, World, towards

PITCH = 12  # from cell to cell
FIRST = float(THICK + RADIUS)  # the dot's centre in the first cell: FIRST to FIRST + ROOM
ROOM = float(PITCH - THICK - 2 * RADIUS)
LEAST_CELLS, MOST_CELLS = 2, 16
FAR = 1 << 20  # longer than any path
MOVES = ((0, 1), (0, -1), (1, 0), (-1, 0))  # of row and column


@dataclass(frozen=True)
class Maze(World):
    """cells x cells cells of 9 pixels, with walls of 3 pixels: an image of 12 * cells + 3 pixels.

    Each episode has its own maze, the minimum spanning tree for uniform random weights. Start and
    goal are in different cells. layout: int64 [N, cells, cells, 2], by row and column, 1 if there
    is a passage to the next cell to the right, and below.

    maze: the seed of one maze, which is that of all episodes; -1: each has its own.
    """

    cells: int = 5
    maze: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.maze, bool) or not isinstance(self.maze, int):
            raise ValueError(f"maze: got {self.maze!r}, takes an integer")
        if not -1 <= self.maze < 2**31:
            raise ValueError(f"maze: got {self.maze}, takes -1 to {2**31 - 1}")
        if isinstance(self.cells, bool) or not isinstance(self.cells, int):
            raise ValueError(f"cells: got {self.cells!r}, takes an integer")
        if not LEAST_CELLS <= self.cells <= MOST_CELLS:
            raise ValueError(f"cells: got {self.cells}, takes {LEAST_CELLS} to {MOST_CELLS}")

    @property
    def size(self) -> int:
        return self.cells * PITCH + THICK

    @property
    def layout_shape(self) -> tuple[int, ...]:
        return (self.cells, self.cells, 2)

    def reset(self, seeds: Tensor) -> State:
        count = self.cells**2
        u = draws.uniform(seeds, Stream.PLACES, 0, 6)
        start = draws.integers(u[:, 0], 0, count - 1)
        goal = (start + draws.integers(u[:, 1], 1, count - 1)) % count
        position, target = (
            FIRST + PITCH * torch.stack([cell % self.cells, cell // self.cells], dim=1) + ROOM * its
            for cell, its in ((start, u[:, 2:4]), (goal, u[:, 4:6]))
        )
        if self.maze < 0:
            layout = self._trees(seeds)
        else:
            its = self._trees(torch.tensor([self.maze], device=seeds.device))
            layout = its.repeat(len(seeds), 1, 1, 1)
        return State(position, target, layout, seeds, torch.zeros_like(seeds))

    def _trees(self, seeds: Tensor) -> Tensor:
        """The layouts, by Prim's algorithm on the whole batch."""
        cells, device = self.cells, seeds.device
        number = torch.arange(cells**2, device=device).view(cells, cells)
        first = torch.cat([number[:, :-1].flatten(), number[:-1].flatten()])  # an edge's ends
        second = torch.cat([number[:, 1:].flatten(), number[1:].flatten()])
        edges, rows = len(first), torch.arange(len(seeds), device=device)
        u = draws.uniform(seeds, Stream.LAYOUT, 0, edges)
        # Integers without ties: the tree is unique.
        weight = (u * 2.0**24).long() * edges + torch.arange(edges, device=device)
        joined = torch.zeros(len(seeds), cells**2, dtype=torch.bool, device=device)
        joined[:, 0] = True
        layout = torch.zeros(len(seeds), cells**2, 2, dtype=torch.int64, device=device)
        below = (second - first) == cells  # cells is at least 2, so an edge to the right is 1
        for _ in range(cells**2 - 1):
            leads_out = joined[:, first] ^ joined[:, second]
            edge = weight.where(leads_out, torch.iinfo(torch.int64).max).argmin(dim=1)
            joined[rows, first[edge]] = True
            joined[rows, second[edge]] = True
            layout[rows, first[edge], below[edge].long()] = 1
        return layout.view(len(seeds), cells, cells, 2)

    def _cell(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [N, 2] (x, y): the cell of a position; in a passage, the cell to the left of it or
        above it. bool [N, 2]: whether the position is in the passage to the right, or below.
        """
        cell = ((position - FIRST) / PITCH).floor().long().clamp(0, self.cells - 1)
        return cell, position > FIRST + PITCH * cell + ROOM

    def free(self, position: Tensor, layout: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        cell, passing = self._cell(position)
        column, row = cell.unbind(1)
        rows = torch.arange(len(cell), device=cell.device)
        along, across = cell[:, axis], passing[:, 1 - axis]
        after = layout[rows, row, column, axis] > 0
        before_row, before_column = (
            ((row - 1).clamp(min=0), column) if axis else (row, (column - 1).clamp(min=0))
        )
        before = (layout[rows, before_row, before_column, axis] > 0) & (along > 0)
        # In a passage along the other axis there are only its two sides.
        low = FIRST + PITCH * (along - (before & ~across).long())
        high = FIRST + PITCH * (along + (after & ~across).long()) + ROOM
        return low, high

    def inside(self, position: Tensor, layout: Tensor) -> Tensor:
        cell, passing = self._cell(position)
        rows = torch.arange(len(cell), device=cell.device)
        end = FIRST + PITCH * (self.cells - 1) + ROOM
        in_picture = ((position >= FIRST) & (position <= end)).all(dim=1)
        open_to = layout[rows, cell[:, 1], cell[:, 0]] > 0
        return in_picture & ~passing.all(dim=1) & (~passing | open_to).all(dim=1)

    def walls(self, layout: Tensor) -> tuple[Tensor, Tensor]:
        count, cells = len(layout), self.cells
        cell, between, outer = _pixels(cells, layout.device)
        # Where neither is between cells there is no wall; where both are there always is one.
        in_cells = (layout[..., 0] == 0)[:, :, cell] & between  # [N, cells, size]
        between_cells = (layout[..., 1] == 0)[:, :, cell] | between
        full = in_cells.new_ones(count, 1, self.size)
        rows = torch.cat([in_cells | outer, between_cells | outer, full], dim=1)
        which = torch.where(outer, 2 * cells, cell + cells * between)
        return rows, which.expand(count, -1)

    def facts(self, state: State) -> dict[str, Tensor]:
        """position: [N, 2]; cell: int64 [N, 2], column and row; openings: as layout."""
        return {
            "position": state.position,
            "cell": self._cell(state.position)[0],
            "openings": state.layout,
        }

    def _steps_to(self, cell: Tensor, layout: Tensor) -> Tensor:
        """int64 [N, rows, columns]: the number of moves from each cell to a given cell [N, 2]."""
        count, cells = len(cell), self.cells
        rows = torch.arange(count, device=cell.device)
        steps = torch.full((count, cells, cells), FAR, device=cell.device)
        steps[rows, cell[:, 1], cell[:, 0]] = 0
        right = torch.where(layout[:, :, :-1, 0] > 0, 1, FAR)
        below = torch.where(layout[:, :-1, :, 1] > 0, 1, FAR)
        while True:
            before = steps
            steps = steps.clone()
            for near, far, cost in (
                (steps[:, :, :-1], before[:, :, 1:], right),
                (steps[:, :, 1:], before[:, :, :-1], right),
                (steps[:, :-1], before[:, 1:], below),
                (steps[:, 1:], before[:, :-1], below),
            ):
                torch.minimum(near, far + cost, out=near)
            if torch.equal(steps, before):
                return steps

    def _next(self, cell: Tensor, goal: Tensor, layout: Tensor) -> Tensor:
        """int64 [N, 2]: the next cell after `cell` on the path to the cell `goal`."""
        steps = self._steps_to(goal, layout)
        rows = torch.arange(len(cell), device=cell.device)
        column, row = cell.unbind(1)
        here = steps[rows, row, column]
        following = cell
        for down, right in MOVES:
            other_row = (row + down).clamp(0, self.cells - 1)
            other_column = (column + right).clamp(0, self.cells - 1)
            from_row = torch.minimum(row, other_row)
            from_column = torch.minimum(column, other_column)
            open_to = layout[rows, from_row, from_column, abs(down)] > 0
            nearer = open_to & (steps[rows, other_row, other_column] == here - 1)
            other = torch.stack([other_column, other_row], dim=1)
            following = torch.where(nearer[:, None], other, following)
        return following

    def expert(self, state: State) -> Tensor:
        cell, passing = self._cell(state.position)
        goal_cell, _ = self._cell(state.goal)
        following = self._next(cell, goal_cell, state.layout)
        onward = (following - cell == passing.long()).all(dim=1)
        back = passing.any(dim=1) & ~onward
        target = torch.where(back[:, None], cell, following)
        middle = FIRST + PITCH * target + ROOM / 2
        arriving = (cell == goal_cell).all(dim=1)
        return towards(state.position, torch.where(arriving[:, None], state.goal, middle))

    def portals(self, state: State) -> list[list[paths.Portal]]:
        cell, passing = self._cell(state.position)
        goal, goal_passing = self._cell(state.goal)
        steps = self._steps_to(goal, state.layout).tolist()
        starts, ends = (2 * cell + passing).tolist(), (2 * goal + goal_passing).tolist()
        return [
            _openings(_chain(start, end, its_steps, layout))
            for start, end, its_steps, layout in zip(
                starts, ends, steps, state.layout.tolist(), strict=True
            )
        ]


def _pixels(cells: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """[size] each: the cell that a pixel of an axis belongs to, or the one before it; bool, whether
    it is between two cells; bool, whether it is in the outer wall.
    """
    place = torch.arange(cells * PITCH + THICK, device=device) - THICK
    outer = (place < 0) | (place >= cells * PITCH - THICK)
    between = (place % PITCH >= PITCH - THICK) & ~outer
    return place.div(PITCH, rounding_mode="floor").clamp(0, cells - 1), between, outer


def _chain(
    start: list[int], end: list[int], steps: list[list[int]], layout: list[list[list[int]]]
) -> list[tuple[int, int]]:
    """The regions on the path from start to end: (2 column, 2 row) is a cell, an odd number means
    a passage.
    """
    column, row = start[0] // 2, start[1] // 2
    chain = [(2 * column, 2 * row)]
    while steps[row][column]:
        for down, right in MOVES:
            next_row, next_column = row + down, column + right
            if not (0 <= next_row < len(steps) and 0 <= next_column < len(steps)):
                continue
            open_to = layout[min(row, next_row)][min(column, next_column)][abs(down)]
            if open_to and steps[next_row][next_column] == steps[row][column] - 1:
                chain += [(column + next_column, row + next_row), (2 * next_column, 2 * next_row)]
                row, column = next_row, next_column
                break
    first, last = (start[0], start[1]), (end[0], end[1])
    if first == last:
        return [first]
    chain = chain[chain.index(first) :] if first in chain[:2] else [first, *chain]
    return chain[: chain.index(last) + 1] if last in chain[-2:] else [*chain, last]


def _openings(chain: list[tuple[int, int]]) -> list[paths.Portal]:
    """The openings between consecutive regions of a path."""
    portals = []
    for here, there in pairwise(chain):
        axis = 0 if here[0] != there[0] else 1
        first = min(here[axis], there[axis])
        place = FIRST + PITCH * (first // 2) + (PITCH if first % 2 else ROOM)
        low = FIRST + PITCH * (here[1 - axis] // 2)
        portals.append(paths.portal(axis, place, low, low + ROOM, there[axis] > here[axis]))
    return portals
