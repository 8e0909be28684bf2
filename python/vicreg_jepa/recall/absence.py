"""What left view is still expected: the surprise at a place that is seen again, after something was
moved, taken away or put there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vicreg_jepa.memory.reader import Reader
from vicreg_jepa.memory.rows import Rows
from vicreg_jepa.recall.visits import APART, DRAWS, Models, Visit, names
from vicreg_jepa.worlds.maze import FIRST, PITCH, ROOM
from vicreg_jepa.worlds.window import HALF, MazeWindow
from vicreg_jepa.worlds.world import REACHED, SPEED, State

GONE = 500  # steps for which the thing was out of view, at least
EDGE = float(HALF + 1)  # pixels: so far from the window's edge a thing is seen whole
NEAREST = 64  # rows around a place, of which those of the first visit are taken
EVERY = 6  # steps between the unchanged windows that are looked at
KINDS = ("moved", "removed", "added")
WAYS = ("with memory", "without memory")


def middles(cells: int) -> Tensor:
    """[cells, cells, 2]: the middle of each cell, by row and column, where its thing lies."""
    line = FIRST + ROOM / 2 + PITCH * torch.arange(cells)
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=2)


def _offset(world: MazeWindow, position: Tensor) -> Tensor:
    """[..., cells, cells, 2]: the middle of each cell from the middles of the windows at positions
    [..., 2].
    """
    return middles(world.cells) - position.floor()[..., None, None, :]


def seen_cells(world: MazeWindow, position: Tensor) -> Tensor:
    """bool [..., cells, cells]: the cells whose middles, with a thing in it, lie inside the windows
    at positions [..., 2].
    """
    return (_offset(world, position).abs() <= world.size // 2 - EDGE).all(dim=-1)


def touched_cells(world: MazeWindow, position: Tensor) -> Tensor:
    """bool [..., cells, cells]: the cells of which a thing would be seen, if only its edge."""
    return (_offset(world, position).abs() <= world.size // 2 + EDGE).all(dim=-1)


@dataclass(frozen=True)
class Case:
    """Of a maze, by its number: a cell with a thing and one without, (row, column), that were both
    in view from `place` at a step of the first visit, and neither for the last GONE steps of it.
    """

    maze: int
    place: Tensor
    full: tuple[int, int]
    empty: tuple[int, int]


def cases(world: MazeWindow, state: State, first: Tensor) -> list[Case]:
    """One for each maze that has any: from the place where both cells are farthest inside the
    window, so that who comes back to about there sees them. state: of the first visit; first: its
    positions [N, T, 2].
    """
    chosen = []
    for maze, positions in enumerate(first[:, :-GONE]):
        forgotten = ~touched_cells(world, first[maze, -GONE:]).any(dim=0)
        things = state.layout[maze, :, :, 2] > 0
        inside = world.size // 2 - EDGE - _offset(world, positions).abs().amax(dim=-1)
        inside = torch.where(forgotten, inside, -torch.inf)
        margins, cells = zip(
            *(
                torch.where(kind, inside, -torch.inf).flatten(1).max(dim=1)
                for kind in (things, ~things)
            ),
            strict=True,
        )
        margin, time = torch.minimum(*margins).max(dim=0)
        if margin < 0:
            continue
        full, empty = (divmod(int(cell[time]), world.cells) for cell in cells)
        chosen.append(Case(maze, positions[time], full, empty))
    return chosen


def changed(state: State, case: Case, kind: str) -> State:
    """The scene after a change; state: of one environment. moved: from the full to the empty cell;
    removed: from the full cell; added: to the empty cell.
    """
    layout = state.layout.clone()
    if kind in ("moved", "removed"):
        layout[0, case.full[0], case.full[1], 2] = 0
    if kind in ("moved", "added"):
        layout[0, case.empty[0], case.empty[1], 2] = 1
    return state._replace(layout=layout)


def hidden(world: MazeWindow, position: Tensor, chosen: Sequence[Case]) -> Tensor:
    """bool [N]: whether both cells of each case are out of view at positions [N, 2]."""
    touched = touched_cells(world, position)
    return torch.tensor(
        [not (t[c.full] or t[c.empty]) for t, c in zip(touched, chosen, strict=True)]
    )


def returning(world: MazeWindow, state: State, first: Tensor, chosen: Sequence[Case]) -> State:
    """The first states of the visits that return to the places of cases, from elsewhere.

    state: of the first visit to the mazes of the cases; first: its positions [N, T, 2].
    """
    done = torch.zeros(len(chosen), dtype=torch.bool)
    state = state._replace(goal=torch.stack([case.place for case in chosen]))
    for draw in range(DRAWS):
        other = state._replace(position=world.reset(state.seed + APART * (draw + 1)).position)
        apart = torch.linalg.vector_norm(first - other.position[:, None], dim=2).amin(dim=1)
        good = hidden(world, other.position, chosen) & (apart <= REACHED)
        state, done = other.where(good & ~done, state), done | good
    if not bool(done.all()):
        raise ValueError(
            f"chosen: {int((~done).sum())} cases have no start from which they are hidden"
        )
    return state


@dataclass
class Surprises:
    """The surprise of K cases whose cells came into view again, and of the others nothing.

    kinds: moved, and removed or added by turns. true, changed: by kind, float64 [K of it] each,
    with memory and without. usual: with memory, of unchanged windows before that.
    """

    true: dict[str, dict[str, list[float]]]
    changed: dict[str, dict[str, list[float]]]
    usual: list[float]
    lost: int


def _none() -> dict[str, dict[str, list[float]]]:
    return {way: {kind: [] for kind in KINDS} for way in WAYS}


def measured(
    world: MazeWindow,
    models: Models,
    store: Path,
    state: State,
    seen: Visit,
    chosen: Sequence[Case],
) -> Surprises:
    """The surprise when the cells of cases come into view in a visit `seen` that began in `state`.

    store: what the first visit remembered, and only its rows are recalled. With memory the
    expectation is the row whose place is nearest, moved by the world model to where the agent takes
    itself to be; without it the world model continues the last frame before a cell came into view.
    """
    found = Surprises(_none(), _none(), [], 0)
    with Reader(store) as reader, torch.no_grad():
        session = int(reader.rows().session.min())
        for number, case in enumerate(chosen):
            path = seen.positions[number]
            inside = seen_cells(world, path)
            both = inside[:, case.full[0], case.full[1]] & inside[:, case.empty[0], case.empty[1]]
            if not bool(both.any()):
                found.lost += 1
                continue
            step = int(both.nonzero()[0, 0])
            out = hidden(world, path[:step], [case] * step)
            before = int(out.nonzero()[-1, 0])

            def expected(at: int, number: int = number) -> Tensor | None:
                place = seen.places[number, at : at + 1]
                if bool(place.isnan().any()):
                    return None
                world_name = names(state.seed[number : number + 1])[0]
                rows = reader.around(place, NEAREST, world_name)[0].rows
                rows = rows.take(rows.session == session)
                return carried(models, rows, place) if len(rows) else None

            def scene(at: int, kind: str | None, number: int = number, case: Case = case) -> Tensor:
                one = state.rows(slice(number, number + 1))
                one = one._replace(position=seen.positions[number, at : at + 1])
                one = one if kind is None else changed(one, case, kind)
                return models.model.encode(world.render(one))

            remembered = expected(step)
            if remembered is None:
                found.lost += 1
                continue
            continued = models.model.rollout(
                scene(before, None), seen.actions[number, before:step][None, None]
            )[:, 0, -1]
            for at in range(0, before, EVERY):
                usual = expected(at)
                if usual is not None:
                    found.usual.append(_apart(usual, scene(at, None)))
            for kind in ("moved", "added" if number % 2 else "removed"):
                for way, expectation in zip(WAYS, (remembered, continued), strict=True):
                    found.true[way][kind].append(_apart(expectation, scene(step, None)))
                    found.changed[way][kind].append(_apart(expectation, scene(step, kind)))
    return found


def carried(models: Models, rows: Rows, place: Tensor) -> Tensor:
    """[1, D]: the latents of the first row, moved by the world model to a place [1, 2]."""
    way = place - torch.from_numpy(rows.place[:1])
    latents = torch.from_numpy(rows.embedding[:1])
    steps = max(1, math.ceil(float(way.abs().max()) / SPEED))
    action = (way / (SPEED * steps)).float().expand(steps, -1)
    return models.model.rollout(latents, action[None, None])[:, 0, -1]


def _apart(first: Tensor, second: Tensor) -> float:
    return float(torch.linalg.vector_norm(first - second))


def paired(true: Sequence[float], changed: Sequence[float]) -> int:
    """In how many pairs the changed scene surprises more."""
    return sum(b > a for a, b in zip(true, changed, strict=True))
