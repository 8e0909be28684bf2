"""An agent that sees windows: it finds back to where it has been, and explores what it lacks."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vicreg_jepa.memory.memory import Memory
from vicreg_jepa.memory.rows import Rows
from vicreg_jepa.planning.model import LatentModel
from vicreg_jepa.planning.planner import Effort, Planner, PlanRequest
from vicreg_jepa.planning.planners import ICEM
from vicreg_jepa.recall.graph import Floats, Graph, ahead
from vicreg_jepa.recall.places import PlaceArrival, PlaceModel, to_place
from vicreg_jepa.worlds.world import ACTIONS, SPEED, State, World

AHEAD = 12.0  # pixels of walking to a subgoal: within the window
NEAR = 1.5  # pixels: a plan arrives so near to its subgoal, and so near to a goal it stands still
RAYS, RAY = 16, 8  # directions that are imagined, and their steps
NEW = 6.0  # pixels: an imagined place so far from every known one is worth a visit
TRIES, SLOW = 2, 6.0  # plans for an imagined place: these, and one for so many pixels of the way
VOTERS, MOST_VOTES = 8, 80  # rows that vote in a plan for where the agent is; votes that count
SHARP = 0.65  # of `match`: the scale of the weights of votes
RECALLED = 32  # rows that look like the goal
BESIDE, TICKS, LOOKS = 5.0, 9, 4  # pixels from a goal, motions along an axis, and looks at it
PATIENCE = 1  # plans at a place that does not look like the goal, before it is refused
AGREE, LOCATED = 3.0, 1.0  # pixels, and the least weight, of votes that agree


def planner() -> Planner:
    """The low-level planner: eight steps ahead, a plan every six, ended when it arrives."""
    return ICEM(
        horizon=4, repeat=2, candidates=32, elites=6, kept=3, iterations=3, interval=6,
        effort=Effort(horizon=4),
    )  # fmt: skip


@dataclass
class Frontier:
    """An imagined place, where it was imagined from, and when; plans: how many may go there."""

    time: int
    launch: Floats
    place: Floats
    plans: float | None = None

    def moved(self, by: Floats) -> Frontier:
        return Frontier(self.time, self.launch + by, self.place + by, self.plans)


@dataclass
class Mind:
    """What the agent knows of one world. Its own frame of coordinates begins where it began; the
    memory's frame is that of the first visit. Places are in the memory's frame if the agent is
    located in it, else in its own.

    rows: what the memory had of this world. trail: (time, place in its own frame) of the frames.
    alike: (time, place in its own frame, distance) of those that looked like the goal; recalled:
    ([K, 2], [K]), the places in the memory's frame and the distances of rows that did; refused:
    places that did not when it was there, and waits: for how many plans it has been at the goal.
    found: the goal's place in its own frame, by `looks` looks at it from beside it.
    graph: places where it has been. given_up: imagined places that it did not reach. offset: of the
    memory's frame from its own; None: it is not located. votes: (offset, weight).
    """

    rows: Rows | None
    trail: deque[tuple[int, Floats]]
    alike: list[tuple[int, Floats, float]] = field(default_factory=list)
    recalled: tuple[Floats, Floats] | None = None
    graph: Graph = field(default_factory=Graph)
    frontiers: list[Frontier] = field(default_factory=list)
    given_up: list[Floats] = field(default_factory=list)
    refused: list[Floats] = field(default_factory=list)
    waits: int = 0
    found: Floats | None = None
    looks: int = 0
    offset: Floats | None = None
    votes: list[tuple[Floats, float]] = field(default_factory=list)

    @property
    def shift(self) -> Floats:
        return np.zeros(2) if self.offset is None else self.offset

    def vote(self, offsets: Floats, weights: Floats) -> None:
        """Be located where the votes agree: offsets [K, 2] and their weights [K]."""
        self.votes += list(zip(offsets, weights.tolist(), strict=True))
        self.votes = self.votes[-MOST_VOTES:]
        every = np.array([offset for offset, _ in self.votes])
        weight = np.array([weight for _, weight in self.votes])
        agree = (np.linalg.norm(every[:, None] - every, axis=2) <= AGREE) * weight
        total = agree.sum(axis=1)
        best = int(total.argmax())
        if total[best] >= LOCATED:
            self._locate((agree[best] @ every) / total[best])

    def _locate(self, offset: Floats) -> None:
        moved = offset - self.shift
        if self.offset is not None and np.linalg.norm(moved) < 0.5:
            return
        self.offset = offset
        self.frontiers = [one.moved(moved) for one in self.frontiers]
        self.given_up = [place + moved for place in self.given_up]
        self.refused = [place + moved for place in self.refused]
        assert self.rows is not None
        self.graph = Graph.of(self.rows)
        for time, place in self.trail:
            self.graph.add(place + offset, time)

    def goal(self, match: float) -> Floats | None:
        """Where a frame looked like the goal, if any did: the mean of the places around the best
        that look as much like it.
        """
        if self.found is not None:
            return np.asarray(self.found + self.shift)
        found = [(place + self.shift, apart) for _, place, apart in self.alike]
        if self.recalled is not None and self.offset is not None:
            found += zip(*self.recalled, strict=True)
        found = [
            (place, apart)
            for place, apart in found
            if apart <= match and all(np.linalg.norm(place - no) >= NEW for no in self.refused)
        ]
        if not found:
            return None
        best, least = min(found, key=lambda one: one[1])
        least = max(least, 1e-6)  # the picture of the goal may be a frame that it saw
        near = [one for one in found if np.linalg.norm(one[0] - best) <= AGREE]
        weight = np.array([np.exp(2 - 2 * (apart / least) ** 2) for _, apart in near])
        return np.asarray(weight @ np.array([place for place, _ in near]) / weight.sum())

    def doubts(self, place: Floats | None, here: Floats, alike: bool) -> bool:
        """Whether the goal's place is refused now: it has been there for some plans, and what it
        sees is not `alike`.
        """
        there = place is not None and float(np.linalg.norm(place - here)) <= NEAR + 0.5
        self.waits = self.waits + 1 if there else 0
        if place is None or alike or self.waits <= PATIENCE:
            return False
        self.refused.append(place)
        self.found, self.looks, self.waits = None, 0, 0
        return True


def rays() -> Tensor:
    """[RAYS, RAY, 2]: straight ahead at full speed, in every direction."""
    angle = torch.arange(RAYS) * (2 * torch.pi / RAYS)
    way = torch.stack([angle.cos(), angle.sin()], dim=1)
    return (way / way.abs().amax(dim=1, keepdim=True))[:, None].expand(-1, RAY, -1)


class Agent:
    """The agent in N environments at once.

    model: encodes windows and predicts them; places: predicts its places. goal: the latents [N, D]
    of a picture of each goal; None: it explores only. match: latents so near are of one place.
    memory: where it remembers, and recalls from; None: it has none. span: it knows the last `span`
    frames alone; None: all since it began.
    """

    def __init__(
        self,
        model: LatentModel,
        places: PlaceModel,
        world: World,
        state: State,
        match: float,
        goal: Tensor | None = None,
        memory: Memory | None = None,
        span: int | None = None,
        low: Planner | None = None,
    ) -> None:
        self.model, self.places, self.world, self.match = model, places, world, match
        self.goal, self.memory, self.span = goal, memory, span
        self.low = planner() if low is None else low
        self.state, self.step = state, 0
        count = len(state.position)
        self.own = np.zeros((count, 2))  # the place in its own frame: the sum of its motions
        self.latents = self._encoded(state)
        self.rollout_steps = torch.zeros(count, dtype=torch.int64)
        self.minds = self._minds(count)
        self.former = torch.zeros(count, self.low.horizon, ACTIONS)
        self.coming = torch.zeros(count, self.low.interval, ACTIONS)
        self.subgoals = torch.zeros(count, 2)
        self.surprise = torch.zeros(count)  # of the last step: how far the prediction was off
        self.goals = np.full((count, 2), np.nan)  # their places, where it knows them
        self.rays = rays()
        self._note()

    def located(self) -> Floats:
        """[N, 2]: where it takes itself to be in the memory's frame, NaN where it does not know."""
        unknown = np.full(2, np.nan)
        return np.stack([
            unknown if mind.offset is None else self.place(number)
            for number, mind in enumerate(self.minds)
        ])  # fmt: skip

    def place(self, number: int) -> Floats:
        return np.asarray(self.own[number] + self.minds[number].shift)

    # ------------------------------------------------------------------------- what it remembers
    def _minds(self, count: int) -> list[Mind]:
        """Take over what the memory knows of these worlds, and where the goals are."""
        minds = [Mind(None, deque(maxlen=self.span)) for _ in range(count)]
        if self.memory is None:
            for mind in minds:
                mind.offset = np.zeros(2)  # there is no other frame than its own
            return minds
        rows = self.memory.store.rows()
        rows = rows.take(~np.isnan(rows.place[:, 0]))
        for mind, world in zip(minds, self.memory.worlds, strict=True):
            its = rows.take(rows.world == world)
            if len(its):
                mind.rows = its
            else:
                mind.offset = np.zeros(2)  # the memory's frame begins here
        if self.goal is not None:
            found = self.memory.recall(self.goal, RECALLED)
            for mind, one in zip(minds, found, strict=True):
                if mind.rows is not None and len(one.rows):
                    known = ~np.isnan(one.rows.place[:, 0])
                    mind.recalled = (one.rows.place[known], one.distance[known])
            self.memory.used(found)
        return minds

    def _locate(self) -> None:
        """Find where in the memory's frame it is: what it sees now looks like rows that were seen
        at known places, which vote for the offset between the frames.
        """
        for number, mind in enumerate(self.minds):
            if mind.rows is None or (mind.offset is not None and len(mind.votes) >= MOST_VOTES):
                continue
            away = mind.rows.embedding - self.latents[number].numpy()
            apart = np.linalg.norm(away.astype(np.float64), axis=1)
            alike = apart.argsort(kind="stable")[:VOTERS]
            weights = np.exp(-((apart[alike] / (SHARP * self.match)) ** 2))
            mind.vote(mind.rows.place[alike] - self.own[number], weights)

    def _note(self) -> None:
        """Know the present frame: its place, and how much it looks like the goal."""
        apart = torch.full((len(self.minds),), torch.inf)
        if self.goal is not None:
            apart = torch.linalg.vector_norm(self.latents - self.goal, dim=1)
        self.apart = apart.tolist()
        for number in range(len(self.minds)):
            self._note_in(number)

    def _note_in(self, number: int) -> None:
        mind, far = self.minds[number], self.apart[number]
        mind.graph.add(self.place(number), self.step)
        mind.trail.append((self.step, self.own[number].copy()))
        if far <= self.match:
            mind.alike.append((self.step, self.own[number].copy(), far))

    def _remember(self, action: Tensor, before: Tensor, active: Tensor) -> None:
        """The step just done, with the place where it began; without it if that is not known."""
        if self.memory is None:
            return
        places = np.stack([self.place(number) for number in range(len(self.minds))])
        located = torch.tensor([mind.offset is not None for mind in self.minds])
        for which, where in ((active & located, places), (active & ~located, None)):
            if which.any():
                self.memory.remember(
                    self.step, before, where, action, self.latents, self.surprise, which
                )

    # ------------------------------------------------------------------------------ what it wants
    def _imagine(self, numbers: list[int], start: Tensor) -> None:
        """Imagine straight walks from here: where they end far from every known place, there is
        something to explore.
        """
        every = self.rays[None].expand(len(start), -1, -1, -1).to(start)
        with torch.no_grad():
            ends = self.places.rollout(start, every)[:, :, -1, :2].double().numpy()
        self.rollout_steps[numbers] += RAYS * RAY
        for number, its in zip(numbers, ends, strict=True):
            mind, here = self.minds[number], self.place(number)
            for end in its:
                others = [one.place for one in mind.frontiers] + mind.given_up
                near = [float(np.linalg.norm(end - other)) < NEW for other in others]
                if not any(near) and mind.graph.from_nodes(end).min() >= NEW:
                    mind.frontiers.append(Frontier(self.step, here, end))

    def _subgoal(self, number: int, target: Floats | None) -> Floats:
        """A place within reach on the way to the goal's place, or to what is to be explored."""
        mind, here = self.minds[number], self.place(number)
        graph = mind.graph
        lengths, before = graph.ways(graph.nearest(here))
        if target is not None:
            node = graph.nearest(target)
        else:
            frontier = self._frontier(mind, lengths)
            if frontier is None:
                return here
            node, target = graph.nearest(frontier.launch), frontier.place
            if lengths[node] <= AHEAD / 2:
                return target
        if not np.isfinite(lengths[node]):
            return target
        return ahead(here, np.concatenate([graph.way(before, node), target[None]]), AHEAD)

    def _frontier(self, mind: Mind, lengths: Floats) -> Frontier | None:
        """The one that is nearest on foot; those that were reached, or tried in vain, go."""
        graph = mind.graph
        tried = [one.place for one in mind.frontiers if one.plans is not None and one.plans <= 0]
        mind.given_up += tried
        mind.frontiers = [
            one
            for one in mind.frontiers
            if (one.plans is None or one.plans > 0) and graph.from_nodes(one.place).min() >= NEW
        ]
        if not mind.frontiers:
            return None
        nodes = [graph.nearest(one.launch) for one in mind.frontiers]
        costs = [
            float(lengths[node] + np.linalg.norm(graph.places[node] - one.place))
            for node, one in zip(nodes, mind.frontiers, strict=True)
        ]
        chosen = int(np.argmin(costs))
        frontier = mind.frontiers[chosen]
        if frontier.plans is None:
            frontier.plans = TRIES + costs[chosen] / SLOW
        frontier.plans -= 1
        return frontier

    def _forget(self, mind: Mind) -> None:
        """Keep the last frames alone."""
        first = mind.trail[0][0]
        mind.graph = Graph()
        for time, place in mind.trail:
            mind.graph.add(place, time)
        mind.frontiers = [one for one in mind.frontiers if one.time >= first]
        mind.alike = [one for one in mind.alike if one[0] >= first]
        mind.given_up = []

    # --------------------------------------------------------------------------------- what it does
    def _plan(self, numbers: list[int]) -> None:
        """Plan for these environments."""
        self._locate()
        if self.span is not None:
            for mind in self.minds:
                self._forget(mind)
        goals = {}
        for number in numbers:
            mind, here = self.minds[number], self.place(number)
            goals[number] = mind.goal(self.match)
            if mind.doubts(goals[number], here, self.apart[number] <= self.match):
                goals[number] = mind.goal(self.match)
            known = goals[number]
            self.goals[number] = np.nan if known is None else known
        self._look([number for number in numbers if self._is_beside(number)])
        for number in numbers:
            goals[number] = None if np.isnan(self.goals[number]).any() else self.goals[number]
        there = self._arrived()
        numbers = [number for number in numbers if not there[number]]
        if not numbers:
            return
        where = torch.from_numpy(np.stack([self.place(number) for number in numbers]))
        start = self.places.start(where, self.latents[numbers], self.state.rows(numbers))
        lost = [p for p, number in enumerate(numbers) if goals[number] is None]
        if lost:
            self._imagine([numbers[p] for p in lost], start[lost])
        subgoals = np.stack([self._subgoal(number, goals[number]) for number in numbers])
        self.subgoals[numbers] = torch.from_numpy(subgoals).to(self.subgoals)
        self.coming[numbers] = self._to_subgoals(numbers, start)

    def _to_subgoals(self, numbers: list[int], start: Tensor) -> Tensor:
        """Actions [n, interval, A] to the subgoals of these environments."""
        to = self.subgoals[numbers].to(start)
        request = PlanRequest(
            start, to_place(to, NEAR), self.state.seed[numbers], self.step,
            self.former[numbers].to(start), PlaceArrival(to, NEAR),
        )  # fmt: skip
        with torch.no_grad():
            plan = self.low.plan(self.places, request)
        self.rollout_steps[numbers] += plan.rollout_steps
        self.former[numbers] = self.low.shifted(plan.actions, self.low.interval)
        return self.low.held(plan.actions)[:, : self.low.interval]

    def act(self, active: Tensor) -> State:
        """Do the next step of a plan in the environments that are active, bool [N]."""
        return self.led(self.wanted(active), active)

    def wanted(self, active: Tensor) -> Tensor:
        """The next action [N, A] of a plan; 0 where it takes itself to be at the goal."""
        if self.step % self.low.interval == 0:
            self._plan(active.nonzero()[:, 0].tolist())
        action = self.coming[:, self.step % self.low.interval]
        stands = torch.from_numpy(self._arrived())
        return torch.where(stands[:, None], 0.0, action)

    def _is_beside(self, number: int) -> bool:
        apart = float(np.linalg.norm(self.place(number) - self.goals[number]))
        return self.minds[number].looks < LOOKS and apart <= BESIDE

    def _look(self, numbers: list[int]) -> None:
        """From beside the goal: of all small motions, the one after which the model predicts to see
        what looks most like the goal leads to it.
        """
        if not numbers or self.goal is None:
            return
        ticks = torch.linspace(-BESIDE, BESIDE, TICKS)
        motions = torch.cartesian_prod(ticks, ticks)  # [K, 2], in pixels
        steps = math.ceil(BESIDE / SPEED)
        actions = (motions / (SPEED * steps))[None, :, None].expand(len(numbers), -1, steps, -1)
        with torch.no_grad():
            path = self.model.rollout(self.latents[numbers], actions)[:, :, -1]
        best = torch.linalg.vector_norm(path - self.goal[numbers][:, None], dim=2).argmin(dim=1)
        self.rollout_steps[numbers] += len(motions) * steps
        for number, motion in zip(numbers, motions[best].double().numpy(), strict=True):
            mind = self.minds[number]
            mind.found, mind.looks = self.own[number] + motion, mind.looks + 1
            self.goals[number] = mind.found + mind.shift

    def _arrived(self) -> NDArray[np.bool_]:
        """bool [N]: whether it takes itself to be at the goal."""
        where = np.stack([self.place(number) for number in range(len(self.minds))])
        return np.asarray(np.linalg.norm(where - self.goals, axis=1) <= NEAR)

    def led(self, action: Tensor, active: Tensor) -> State:
        """Do an action [N, A] in the environments that are active, and see what comes of it."""
        self.action = action = torch.where(active[:, None], action.clamp(-1, 1), 0.0)
        state, before = self.world.step(self.state, action), self.latents
        felt = (state.position - self.state.position).double().numpy()
        state = self.disturbed(state)
        self.latents = self._encoded(state)
        with torch.no_grad():
            predicted = self.model.rollout(before, action[:, None, None])[:, 0, 0]
        self.surprise = torch.linalg.vector_norm(predicted - self.latents, dim=1)
        self._remember(action, before, active)
        self.own += felt
        self.state, self.step = state, self.step + 1
        self._note()
        return state

    def disturbed(self, state: State) -> State:
        """What becomes of a state without the dot's doing, which it does not feel: nothing."""
        return state

    def _encoded(self, state: State) -> Tensor:
        with torch.no_grad():
            return self.model.encode(self.world.render(state))
