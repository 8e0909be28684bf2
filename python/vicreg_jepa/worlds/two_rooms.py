"""Two rooms, a wall between them, and a door in the wall."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vicreg_jepa.worlds import draws, paths
from vicreg_jepa.worlds.draws import Stream
from vicreg_jepa.worlds.world import RADIUS, THICK, State, World, towards

SIZE = 65
DOOR = 11  # the opening's height
LOW, HIGH = float(THICK + RADIUS), float(SIZE - THICK - RADIUS)  # of the dot's centre
FIXED = (31, 12)  # the wall's left edge, the door's upper edge
LEAST_ROOM = 15  # from the picture's edge to the wall
WALLS = (LEAST_ROOM, SIZE - THICK - LEAST_ROOM)
DOORS = (THICK, SIZE - THICK - DOOR)
MARGIN = 1.0  # the expert keeps so far from the door's edges


@dataclass(frozen=True)
class TwoRooms(World):
    """65 x 65 pixels: an outer wall, and a vertical wall of 3 pixels with a door of 11 pixels.

    wall: "fixed", the wall and the door have the same place in all episodes; "random", their places
    are drawn for each episode. goal: "other", the goal is in the other room than the start; "any",
    it is in either room. layout: int64 [N, 2], the left edge of the wall and the upper edge of the
    door.
    """

    wall: str = "fixed"
    goal: str = "other"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, takes in (("wall", ("fixed", "random")), ("goal", ("other", "any"))):
            if getattr(self, name) not in takes:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, takes {' or '.join(takes)}")

    @property
    def size(self) -> int:
        return SIZE

    @property
    def layout_shape(self) -> tuple[int, ...]:
        return (2,)

    def reset(self, seeds: Tensor) -> State:
        if self.wall == "fixed":
            layout = torch.tensor(FIXED, device=seeds.device).expand(len(seeds), 2)
        else:
            u = draws.uniform(seeds, Stream.LAYOUT, 0, 2)
            layout = torch.stack(
                [draws.integers(u[:, 0], *WALLS), draws.integers(u[:, 1], *DOORS)], dim=1
            )
        left, right, _, _ = _edges(layout)
        u = draws.uniform(seeds, Stream.PLACES, 0, 6)
        start_left = u[:, 0] < 0.5
        goal_left = ~start_left if self.goal == "other" else u[:, 1] < 0.5
        places = []
        for in_left, its in ((start_left, u[:, 2:4]), (goal_left, u[:, 4:6])):
            x = draws.between(
                its[:, 0], torch.where(in_left, LOW, right), torch.where(in_left, left, HIGH)
            )
            places.append(torch.stack([x, draws.between(its[:, 1], LOW, HIGH)], dim=1))
        return State(places[0], places[1], layout, seeds, torch.zeros_like(seeds))

    def free(self, position: Tensor, layout: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        left, right, top, bottom = _edges(layout)
        x, y = position.unbind(1)
        if axis == 0:
            in_door = (y >= top) & (y <= bottom)
            return (
                torch.where(in_door | (x <= left), LOW, right),
                torch.where(in_door | (x >= right), HIGH, left),
            )
        passing = (x > left) & (x < right)
        return torch.where(passing, top, LOW), torch.where(passing, bottom, HIGH)

    def inside(self, position: Tensor, layout: Tensor) -> Tensor:
        left, right, top, bottom = _edges(layout)
        x, y = position.unbind(1)
        passing = (x > left) & (x < right)
        in_picture = ((position >= LOW) & (position <= HIGH)).all(dim=1)
        return in_picture & (~passing | ((y >= top) & (y <= bottom)))

    def walls(self, layout: Tensor) -> tuple[Tensor, Tensor]:
        pixel = torch.arange(SIZE, device=layout.device)
        outer = (pixel < THICK) | (pixel >= SIZE - THICK)
        wall, door = layout[:, :1], layout[:, 1:]
        open_row = outer.expand(len(layout), SIZE)
        closed_row = outer | ((pixel >= wall) & (pixel < wall + THICK))
        rows = torch.stack([open_row, closed_row, torch.ones_like(open_row)], dim=1)
        in_door = (pixel >= door) & (pixel < door + DOOR)
        return rows, torch.where(outer, 2, torch.where(in_door, 0, 1))

    def facts(self, state: State) -> dict[str, Tensor]:
        """position: [N, 2]; wall, door: [N], their middles, in pixels; room: int64 [N], 0 left of
        the wall, 1 in the door, 2 right of the wall.
        """
        left, right, _, _ = _edges(state.layout)
        x = state.position[:, 0]
        return {
            "position": state.position,
            "wall": state.layout[:, 0] + THICK / 2,
            "door": state.layout[:, 1] + DOOR / 2,
            "room": (x > left).long() + (x >= right).long(),
        }

    def expert(self, state: State) -> Tensor:
        left, right, top, bottom = _edges(state.layout)
        x, y = state.position.unbind(1)
        goal_x = state.goal[:, 0]
        rightwards = goal_x > x
        near, far = torch.where(rightwards, left, right), torch.where(rightwards, right, left)
        before = torch.where(rightwards, x < near, x > near)  # in the room before the wall
        passed = torch.where(rightwards, x >= far, x <= far)
        needs_door = ~passed & torch.where(rightwards, goal_x > near, goal_x < near)
        in_door = (y >= top) & (y <= bottom)
        target_x = torch.where(before & ~in_door, near, far)
        target_y = y.clamp(top + MARGIN, bottom - MARGIN)
        through = torch.stack([target_x, target_y], dim=1)
        return towards(state.position, torch.where(needs_door[:, None], through, state.goal))

    def portals(self, state: State) -> list[list[paths.Portal]]:
        rows = torch.stack(
            [state.position[:, 0], state.goal[:, 0], *_edges(state.layout)], dim=1
        ).tolist()
        portals = []
        for x, goal_x, left, right, top, bottom in rows:
            low, high, forward = min(x, goal_x), max(x, goal_x), goal_x > x
            sides = [place for place in (left, right) if low < place < high]
            sides = sides if forward else sides[::-1]
            portals.append([paths.portal(0, place, top, bottom, forward) for place in sides])
        return portals


def _edges(layout: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float32 [N] each: the left, right, top and bottom of the dot's centre inside the door."""
    wall, door = layout.float().unbind(1)
    return wall - RADIUS, wall + THICK + RADIUS, door + RADIUS, door + DOOR - RADIUS
