"""A tour of a maze: the dot is led through all of its cells, by someone who knows the map, and then
walks at random.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_jepa.worlds.maze import FIRST, MOVES, PITCH, ROOM
from vicreg_jepa.worlds.policies import walk
from vicreg_jepa.worlds.window import MazeWindow
from vicreg_jepa.worlds.world import State, towards

THERE = 0.5  # pixels from the middle of a cell


def order(start: tuple[int, int], openings: list[list[list[int]]]) -> list[tuple[int, int]]:
    """The cells (row, column) of a walk through the whole maze, depth first: each is beside the one
    before it. openings: the layout of one maze.
    """
    cells = len(openings)
    steps, seen, branch = [start], {start}, [start]
    while len(seen) < cells**2:
        row, column = branch[-1]
        for down, right in MOVES:
            other = (row + down, column + right)
            if not (0 <= other[0] < cells and 0 <= other[1] < cells) or other in seen:
                continue
            if openings[min(row, other[0])][min(column, other[1])][abs(down)]:
                branch.append(other)
                seen.add(other)
                break
        else:
            branch.pop()
        steps.append(branch[-1])
    return steps


class Tour:
    """A policy of N environments, from their first states; at the end it walks at random."""

    def __init__(self, world: MazeWindow, state: State) -> None:
        starts = world.facts(state)["cell"].flip(1).tolist()  # row, column
        walks = [
            order((row, column), layout)
            for (row, column), layout in zip(starts, state.layout.tolist(), strict=True)
        ]
        longest = max(len(walk) for walk in walks)
        cells = torch.tensor([walk + walk[-1:] * (longest - len(walk)) for walk in walks])
        self.middles = FIRST + ROOM / 2 + PITCH * cells.flip(2).float()  # [N, L, 2]
        self.next = torch.zeros(len(walks), dtype=torch.int64)

    def __call__(self, world: MazeWindow, state: State) -> Tensor:
        """Actions [N, 2]."""
        rows, last = torch.arange(len(self.next)), self.middles.shape[1] - 1
        middle = self.middles[rows, self.next.clamp(max=last)]
        there = (state.position - middle).abs().amax(dim=1) <= THERE
        self.next = torch.where(there, self.next + 1, self.next).clamp(max=last + 1)
        led = towards(state.position, self.middles[rows, self.next.clamp(max=last)])
        return torch.where(self.next[:, None] > last, walk(world, state), led)
