"""Episodes of the system, in which a zone is forbidden and the dot is put elsewhere on the way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vicreg_jepa.act.system import Parts, Push, System
from vicreg_jepa.memory.memory import Memory
from vicreg_jepa.memory.rows import Format
from vicreg_jepa.memory.writer import Writer
from vicreg_jepa.planning.guardrails import Zone
from vicreg_jepa.planning.model import LatentModel, encoded
from vicreg_jepa.planning.shield import Shield
from vicreg_jepa.planning.zones import OUTSIDE
from vicreg_jepa.recall.visits import Models, drawn_from, names
from vicreg_jepa.worlds.episodes import walks
from vicreg_jepa.worlds.window import MazeWindow
from vicreg_jepa.worlds.world import ACTIONS, REACHED, State, World

STEPS = 360  # of an episode; success is judged at its end
PUSHED = 50  # the step in which the dot is put elsewhere
RADIUS = 2.5  # pixels, of a zone: the middles of the cells lie outside
ROOM = 2.0  # pixels from the edge of the zone to where the dot is put
AWAY = 20.0  # pixels from where the episode began to where the dot is put
WALKS = (100, 60)  # and their steps: the prediction's largest error in them is the alarm


@dataclass(frozen=True)
class Scene:
    """What N episodes have in common, whoever acts: the first states, the forbidden zones, and what
    is done to the dot.
    """

    state: State
    zone: Zone
    push: Push


@dataclass
class Acted:
    """What came of N episodes of T steps.

    success: bool [N], at the last step. positions: [N, T + 1, 2], the true ones. clearance: [N, T +
    1], of them from the zone, in pixels: negative is a violation. rollout_steps: int64 [N].
    changed: bool [N, T], where the shield did not execute what the system wanted. surprise: [N, T].
    places: [N, T + 1, 2], where the system takes itself to be, and subgoals: [N, T, 2], both in the
    frame of the first visit, without memory in that of this one; NaN where it does not know. alarm:
    a step surprises above it.
    """

    success: Tensor
    positions: Tensor
    clearance: Tensor
    rollout_steps: Tensor
    changed: Tensor
    surprise: Tensor
    places: Tensor
    subgoals: Tensor
    alarm: float

    @property
    def alarms(self) -> Tensor:
        """bool [N, T]: the steps that surprise."""
        return self.surprise > self.alarm

    @property
    def violations(self) -> Tensor:
        """bool [N]: whether any executed state was in the zone."""
        return (self.clearance < 0).any(dim=1)


def alarm_of(model: LatentModel, world: World, collection: int) -> float:
    """The largest error of a prediction of one step in held-out walks: so a step of such walks
    surprises with a probability below one in the number of their steps.
    """
    states, actions = walks(world, collection, *WALKS)
    latents = encoded(model, world, states)
    with torch.no_grad():
        before = latents[:, :-1].flatten(0, 1)
        after = model.rollout(before, actions.flatten(0, 1)[:, None, None])[:, 0, 0]
    return float(torch.linalg.vector_norm(after - latents[:, 1:].flatten(0, 1), dim=1).max())


def on_the_bend(world: World, state: State) -> Zone:
    """A disc for each environment around the last bend of the shortest way to the goal that is
    farther than REACHED from the start and the goal: the way touches its centre. Where there is no
    such bend the disc lies outside of the picture.
    """
    centres = []
    for way in world.way(state):
        line = torch.tensor(way, dtype=torch.float32)
        ends = line[[0, -1]]
        far = torch.cdist(line[1:-1], ends).amin(dim=1) > REACHED + RADIUS
        bends = line[1:-1][far]
        centres.append(bends[-1] if len(bends) else torch.tensor(OUTSIDE))
    return Zone(torch.stack(centres).to(state.position), RADIUS)


def elsewhere(world: MazeWindow, state: State, zone: Zone, been: Tensor) -> Tensor:
    """Places [N, 2] drawn from positions `been` [N, T, 2]: outside of the zone, AWAY from the start
    and with the goal out of view. Raises ValueError if there is none.
    """
    good = []
    for place in been.unbind(1):
        hidden = ~world.in_view(state._replace(position=place), state.goal)
        away = torch.linalg.vector_norm(place - state.position, dim=1) >= AWAY
        good.append(hidden & away & (zone.at(place) >= ROOM))
    return drawn_from(been, torch.stack(good, dim=1), state.seed, 2)


def scene(world: MazeWindow, state: State, been: Tensor) -> Scene:
    """The zones and the pushes of episodes with these first states; been: [N, T, 2], where the
    first visit came.
    """
    zone = on_the_bend(world, state)
    return Scene(state, zone, Push(PUSHED, elsewhere(world, state, zone, been)))


def acted(
    world: MazeWindow,
    scene: Scene,
    models: Models,
    parts: Parts,
    alarm: float,
    store: Path,
    steps: int = STEPS,
) -> Acted:
    """Run the system with these parts. store: what it remembers; read only with `memory`."""
    state, every = scene.state, torch.ones(len(scene.state.seed), dtype=torch.bool)
    with ExitStack() as stack, torch.no_grad():
        goal = models.model.encode(world.render(world.at(state, state.goal)))
        memory = None
        if parts.memory:
            size = goal.shape[1]
            format = Format(models.name, embedding=size, place=2, action=ACTIONS, outcome=size)
            memory = Memory(stack.enter_context(Writer(store, format)), names(state.seed))
        system = System(
            models.model, models.places, world, state, models.match, goal, memory,
            parts=parts, alarm=alarm, push=scene.push,
        )  # fmt: skip
        shield = Shield((scene.zone,), noise=world.noise, walls=False)
        guard = shield.begin(world, state.position, state.layout)
        positions, places = [state.position], [torch.from_numpy(system.located())]
        changed, surprise, subgoals = [], [], []
        for _ in range(steps):
            action = system.wanted(every)
            if parts.shield:
                safe = guard.act(action, system.state.position)
                changed.append((safe != action.clamp(-1, 1)).any(dim=1))
                action = safe
            state = system.led(action, every)
            if system.step == scene.push.step:  # the shield has a sensor of its own
                guard = shield.begin(world, state.position, state.layout)
            positions.append(state.position)
            surprise.append(system.surprise)
            places.append(torch.from_numpy(system.located()))
            known = ~torch.isnan(places[-1])
            subgoals.append(system.subgoals.double().where(known, torch.nan))
    nothing = torch.zeros(len(every), steps, dtype=torch.bool)
    return Acted(
        success=world.success(state),
        positions=torch.stack(positions, 1),
        clearance=torch.stack([scene.zone.at(place) for place in positions], 1),
        rollout_steps=system.rollout_steps,
        changed=torch.stack(changed, 1) if changed else nothing,
        surprise=torch.stack(surprise, 1),
        places=torch.stack(places, 1),
        subgoals=torch.stack(subgoals, 1),
        alarm=alarm,
    )


def followed(
    world: MazeWindow,
    scene: Scene,
    policy: Callable[[MazeWindow, State], Tensor],
    steps: int = STEPS,
) -> tuple[Tensor, Tensor]:
    """(bool [N], bool [N]): success, and whether a state was in the zone, of a policy that knows
    the true state, in the same episodes.
    """
    state = scene.state
    inside = torch.zeros(len(state.seed), dtype=torch.bool)
    for step in range(steps):
        state = world.step(state, policy(world, state))
        if step + 1 == scene.push.step:
            state = world.at(state, scene.push.places)
        inside = inside | (scene.zone.at(state.position) < 0)
    return world.success(state), inside
