"""Visits to mazes: on one the agent is led around, on a later one, in another process,
it finds a goal that it saw then."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vicreg_jepa.memory.memory import Memory
from vicreg_jepa.memory.rows import Format
from vicreg_jepa.memory.writer import Writer
from vicreg_jepa.planning.model import LatentModel
from vicreg_jepa.recall.agent import Agent
from vicreg_jepa.recall.places import PlaceModel
from vicreg_jepa.recall.tour import Tour
from vicreg_jepa.worlds import draws
from vicreg_jepa.worlds.draws import Stream
from vicreg_jepa.worlds.window import MazeWindow
from vicreg_jepa.worlds.world import ACTIONS, REACHED, State

DRAWS = 200  # of a start and a goal, until the goal is out of view
APART = 1 << 40  # between the seeds of a visit's draws: other mazes of this collection are nearer
SETTLED = 18  # steps: time to come nearer, and to see what the goal looks like
SPAN = 16  # the last frames, of an agent without memory


@dataclass(frozen=True)
class Models:
    """model: the encoder and the predictor of windows; places: of places; match: how near the
    latents of one place are; name: what the store calls the encoder.
    """

    model: LatentModel
    places: PlaceModel
    match: float
    name: str


@dataclass
class Visit:
    """What came of a visit to each of N mazes.

    success: bool [N], at the end. steps, rollout_steps:
    int64 [N], of the world and of the models. positions: [N, T + 1, 2], the true ones, constant
    after the end. places: [N, T + 1, 2], where the agent took itself to be, in the frame of
    its memory; NaN before it knew. state: the last states.
    explored: bool [N, cells, cells], the cells in which the dot was, by row and column. goal:
    [N, 2]. subgoals: [N, T, 2], of the plans, in the frame of `places`. actions: [N, T, A].
    """

    success: Tensor
    steps: Tensor
    rollout_steps: Tensor
    positions: Tensor
    places: Tensor
    explored: Tensor
    state: State
    goal: Tensor
    subgoals: Tensor
    actions: Tensor


def names(seeds: Tensor) -> list[str]:
    """The names of mazes in a store."""
    return [f"maze {seed}" for seed in seeds.tolist()]


def begun(world: MazeWindow, seeds: Tensor, number: int, been: Tensor | None = None) -> State:
    """The first states of visit `number` to the mazes of these seeds: the start and the goal are
    drawn anew, until the goal is out of view. been: positions [N, T, 2]; the start and the goal are
    then at most REACHED pixels from one of these. Raises ValueError if no draw is so.
    """
    state = world.reset(seeds)
    done = torch.zeros(len(seeds), dtype=torch.bool)
    for draw in range(DRAWS):
        other = world.reset(seeds + APART * (1 + number * DRAWS + draw))
        drawn = state._replace(position=other.position, goal=other.goal)
        good = ~world.in_view(drawn, drawn.goal)
        if been is not None:
            for place in (drawn.position, drawn.goal):
                apart = torch.linalg.vector_norm(been - place[:, None], dim=2)
                good = good & (apart.amin(dim=1) <= REACHED)
        state, done = drawn.where(good & ~done, state), done | good
        if bool(done.all()):
            return state
    raise ValueError(f"been: {int((~done).sum())} mazes have no goal that was seen, and is not now")


def drawn_from(been: Tensor, fits: Tensor, seeds: Tensor, place: int) -> Tensor:
    """Places [N, 2], drawn from positions `been` [N, T, 2] where they fit, bool [N, T]. place: of
    the numbers that are drawn, an integer. Raises ValueError where none fits.
    """
    none = ~fits.any(dim=1)
    if bool(none.any()):
        raise ValueError(f"been: in {int(none.sum())} mazes no place fits, takes longer visits")
    u = draws.uniform(seeds, Stream.PLACES, place, been.shape[1])
    return been[torch.arange(len(been)), u.where(fits, -1.0).argmax(dim=1)]


def visit(
    world: MazeWindow,
    state: State,
    models: Models,
    steps: int,
    store: Path | None = None,
    leads: bool = False,
    ends: bool = False,
    span: int | None = None,
) -> Visit:
    """Visit mazes from these states, for `steps` steps.

    store: the file of the memory, where mazes have the names of their seeds; None: none. leads:
    whether the agent is led on a Tour and remembers; else it is shown the picture at the goal, and
    seeks it. ends: whether a visit ends SETTLED steps after the goal is reached. span: the last
    frames that an agent without memory knows; None: all of this visit.
    """
    with ExitStack() as stack, torch.no_grad():
        memory = None
        seen = models.model.encode(world.render(state))
        if store is not None:
            size = seen.shape[1]
            format = Format(models.name, embedding=size, place=2, action=ACTIONS, outcome=size)
            writer = stack.enter_context(Writer(store, format))
            memory = Memory(writer, names(state.seed))
        goal = models.model.encode(world.render(world.at(state, state.goal))) if not leads else None
        agent = Agent(models.model, models.places, world, state, models.match, goal, memory, span)
        return _run(world, agent, steps, ends, Tour(world, state) if leads else None)


def _run(world: MazeWindow, agent: Agent, steps: int, ends: bool, tour: Tour | None) -> Visit:
    state = agent.state
    count = len(state.position)
    active = torch.ones(count, dtype=torch.bool)
    taken = torch.zeros(count, dtype=torch.int64)
    explored = torch.zeros(count, world.cells, world.cells, dtype=torch.bool)
    positions, places = [state.position], [torch.from_numpy(agent.located())]
    subgoals, actions = [], []
    settled = torch.zeros(count, dtype=torch.int64)  # steps since the goal was reached
    for _ in range(steps):
        if ends:
            settled = torch.where((settled > 0) | world.success(state), settled + 1, settled)
            active = settled <= SETTLED
        if not bool(active.any()):
            break
        state = agent.act(active) if tour is None else agent.led(tour(world, state), active)
        taken += active
        positions.append(state.position)
        places.append(torch.from_numpy(agent.located()))
        subgoals.append(agent.subgoals.clone())
        actions.append(agent.action)
        column, row = world.facts(state)["cell"].unbind(1)
        explored[torch.arange(count), row, column] = True
    return Visit(
        world.success(state), taken, agent.rollout_steps, torch.stack(positions, 1),
        torch.stack(places, 1), explored, state, state.goal, torch.stack(subgoals, 1),
        torch.stack(actions, 1),
    )  # fmt: skip
