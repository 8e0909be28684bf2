"""Mistakes in what planning takes: each error names the argument, what it got and what it takes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from vicreg_jepa.planning import conformal, report
from vicreg_jepa.planning.adversaries import trial
from vicreg_jepa.planning.energies import (
    Arrival,
    ControlCost,
    Function,
    GoalDistance,
    Weighted,
    energy_of,
    to_goal,
)
from vicreg_jepa.planning.evaluate import episodes
from vicreg_jepa.planning.guardrails import Clearance, Distance, Speed, Zone
from vicreg_jepa.planning.model import TrueModel
from vicreg_jepa.planning.penalties import Lagrangian
from vicreg_jepa.planning.planner import Effort, PlanRequest
from vicreg_jepa.planning.planners import CEM, ICEM, MPPI, CategoricalCEM, Gradient
from vicreg_jepa.planning.shield import Shield
from vicreg_jepa.worlds.two_rooms import TwoRooms

WORLD = TwoRooms()
MODEL = TrueModel(WORLD)
STATE = WORLD.reset(torch.arange(2))
START = MODEL.observe(STATE)
GOAL = MODEL.observe(WORLD.at(STATE, STATE.goal))
SEEDS = torch.arange(2)
CENTRE = torch.tensor([-50.0, -50.0])
ZONE = Zone(CENTRE, radius=1.0)
NAN = float("nan")
SMALL = CEM(candidates=8, elites=4, iterations=1)


def plan(planner=SMALL, **changed):
    request = PlanRequest(START, GoalDistance(GOAL), SEEDS)
    return planner.plan(MODEL, dataclasses.replace(request, **changed))


def guard():
    return Shield((ZONE,)).begin(WORLD, STATE.position, STATE.layout)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CEM(horizon=0), "horizon: got 0, takes 1 or more"),
        (lambda: CEM(candidates=2.5), "candidates: got 2.5, takes an integer"),
        (lambda: CEM(iterations=True), "iterations: got True, takes an integer"),
        (lambda: CEM(warm="no"), "warm: got 'no', takes True, False"),
        (lambda: CEM(interval=7), r"interval: got 7, takes a multiple of repeat \(5\)"),
        (lambda: CEM(interval=90), r"interval: got 90, takes a .* up to horizon \* repeat \(80\)"),
        (lambda: CEM(elites=257), "elites: got 257, takes 1 to 256"),
        (lambda: CEM(deviation=0.0), "deviation: got 0.0, takes more than 0"),
        (lambda: CEM(least=-0.1), "least: got -0.1, takes 0 or more"),
        (lambda: CEM(momentum=1.5), "momentum: got 1.5, takes 0 or more, at most 1"),
        (lambda: CEM(colour=NAN), "colour: got nan, takes 0 or more"),
        (lambda: ICEM(kept=25), "kept: got 25, takes 1 to 24"),
        (lambda: ICEM(candidates=8, elites=8, kept=7), "candidates: got 8, takes 9 or more"),
        (lambda: MPPI(temperature=0), "temperature: got 0, takes more than 0"),
        (lambda: Gradient(rate="fast"), "rate: got 'fast', takes a number"),
        (
            lambda: CategoricalCEM(choices=torch.zeros(3)),
            r"choices: got shape \[3\], takes \[any, any\]",
        ),
        (lambda: CategoricalCEM(choices=torch.zeros(0, 2)), "choices: got no action"),
        (lambda: CategoricalCEM(choices=torch.full((2, 2), NAN)), "choices: got values that are"),
        (
            lambda: CategoricalCEM(choices=torch.zeros(4, 2), least=0.5),
            "least: got 0.5, takes 0 or more, at most 0.25",
        ),
        (lambda: Effort(horizon=0), "horizon: got 0, takes 1 or more"),
        (lambda: Effort(growth=0.5), "growth: got 0.5, takes 1 or more"),
        (lambda: Effort(every=0), "every: got 0, takes 1 or more"),
        (lambda: plan(start=START[0]), r"start: got shape \[4\], takes \[any, any\]"),
        (lambda: plan(seed=torch.arange(3)), r"seed: got shape \[3\], takes \[2\]"),
        (lambda: plan(seed=torch.zeros(2)), "seed: got torch.float32, takes torch.int64"),
        (lambda: plan(former=torch.zeros(2, 3, 2)), r"former: got .*, takes \[2, 16, 2\]"),
        (lambda: plan(former=torch.full((2, 16, 2), NAN)), "former: got values that are not"),
        (lambda: plan(CEM(effort=Effort())), "arrival: got None, takes an Arrival"),
        (
            lambda: plan(energy=lambda path, actions: path.sum()),
            r"energy: got a result of \[\], takes \[2, 8\]",
        ),
        (lambda: plan(energy=lambda path, actions: 3.0), "energy: got a result of float"),
        (lambda: GoalDistance(GOAL, at="start"), "at: got 'start', takes 'sum', 'end', 'min'"),
        (lambda: GoalDistance(GOAL, norm="l3"), "norm: got 'l3', takes 'l2', 'l1', 'squared'"),
        (lambda: GoalDistance(GOAL[0]), r"goal: got shape \[4\], takes \[any, any\]"),
        (lambda: plan(energy=GoalDistance(GOAL[:1])), r"goal: got shape \[1, 4\], takes \[2, 4\]"),
        (
            lambda: plan(CEM(effort=Effort()), arrival=Arrival(GOAL[:1], 1.0)),
            r"goal: got shape \[1, 4\], takes \[2, 4\]",
        ),
        (lambda: GoalDistance([1.0]), "goal: got list, takes a tensor"),
        (lambda: ControlCost(-1.0), "weight: got -1.0, takes 0 or more"),
        (lambda: Weighted(ControlCost(), NAN), "weight: got nan, takes 0 or more"),
        (lambda: CEM(effort=3), "effort: got 3, takes an Effort or None"),
        (lambda: CEM(project=None), "project: got None, takes a callable of actions"),
        (lambda: plan(time=torch.arange(3)), r"time: got shape \[3\], takes \[2\]"),
        (lambda: to_goal(GOAL, 0.0), "near: got 0.0, takes more than 0"),
        (lambda: to_goal(GOAL, 2.0, haste=-1.0), "haste: got -1.0, takes 0 or more"),
        (
            lambda: episodes(MODEL, WORLD, SMALL, SEEDS, NAN),
            "near: got nan, takes more than 0",
        ),
        (
            lambda: episodes(MODEL, WORLD, SMALL, SEEDS[:0], 2.0),
            "seeds: got 0 of torch.int64, takes one or more of torch.int64",
        ),
        (
            lambda: episodes(MODEL, WORLD, SMALL, SEEDS.float(), 2.0),
            "seeds: got 2 of torch.float32, takes one or more of torch.int64",
        ),
        (lambda: energy_of(3), "energy: got 3, takes a callable"),
        (lambda: Function(None), "energy: got None, takes a callable"),
        (lambda: Arrival(GOAL, -1.0), "threshold: got -1.0, takes 0 or more"),
        (lambda: Arrival(GOAL, 1.0, at="ever"), "at: got 'ever', takes 'end', 'any'"),
        (
            lambda: episodes(MODEL, WORLD, SMALL, SEEDS, 2.0, steps=0),
            "steps: got 0, takes 1 or more",
        ),
        (
            lambda: episodes(MODEL, WORLD, SMALL, SEEDS, 2.0, delay=-1),
            "delay: got -1, takes 0 or more",
        ),
        (
            lambda: episodes(MODEL, WORLD, SMALL, SEEDS, 2.0, shield=Shield((ZONE,)), delay=1),
            "delay: got 1, takes that of the shield, 0",
        ),
        (
            lambda: episodes(MODEL, WORLD, SMALL, SEEDS, 2.0, shield=Shield((ZONE,), delay=2)),
            "delay: got 0, takes that of the shield, 2",
        ),
        (
            lambda: episodes(MODEL, WORLD, SMALL, SEEDS[0], 2.0),
            r"seeds: got shape \[\], takes \[any\]",
        ),
        (lambda: Zone(CENTRE), "radius, half: got both or none, takes one"),
        (lambda: Zone(CENTRE, 1.0, CENTRE), "radius, half: got both or none, takes one"),
        (lambda: Zone(CENTRE, radius=-1.0), "radius: got -1.0, takes finite numbers of 0 or more"),
        (lambda: Zone(CENTRE * NAN, radius=1.0), "centre: got values that are not finite"),
        (lambda: Zone((1.0, 2.0), radius=1.0), r"centre: got \(1.0, 2.0\), takes a tensor"),
        (lambda: Zone(CENTRE, half=-CENTRE * 0 - 1), r"half: got \[-1.0, -1.0\], takes finite"),
        (lambda: Zone(CENTRE, radius=1.0, margin=-1), "margin: got -1, takes 0 or more"),
        (
            lambda: Zone(torch.zeros(3, 2), radius=1.0).at(STATE.position),
            "centre: got 3 rows, takes one for each of 2",
        ),
        (
            lambda: Shield((Zone(torch.zeros(1, 2), radius=1.0),)).begin(
                WORLD, STATE.position, STATE.layout
            ),
            "centre: got 1 rows, takes one for each of 2",
        ),
        (
            lambda: Zone(CENTRE, half=torch.ones(1, 2)).at(STATE.position),
            "half: got 1 rows, takes one for each of 2",
        ),
        (
            lambda: Zone(CENTRE, radius=torch.ones(1)).at(STATE.position),
            "radius: got 1 rows, takes one for each of 2",
        ),
        (
            lambda: Distance(torch.zeros(1, 2), 1.0).at(STATE.position),
            "place: got 1 rows, takes one for each of 2",
        ),
        (lambda: Distance(CENTRE, 0.0), "most: got 0.0, takes more than 0"),
        (lambda: Distance(torch.zeros(3), 1.0), "place: got .*, takes a tensor"),
        (lambda: Speed(NAN), "most: got nan, takes more than 0"),
        (lambda: Clearance(3), "function: got 3, takes a callable"),
        (lambda: Clearance(torch.sum).at(STATE.position), "function: got tensor"),
        (lambda: Shield(()), r"constraints: got \(\), takes a tuple of one Constraint"),
        (lambda: Shield((3,)), r"constraints: got \(3,\), takes a tuple of one Constraint"),
        (lambda: Shield((ZONE,), noise=1.5), "noise: got 1.5, takes 0 or more, at most 1"),
        (lambda: Shield((ZONE,), error=-1.0), "error: got -1.0, takes 0 or more"),
        (lambda: Shield((ZONE,), delay=0.5), "delay: got 0.5, takes an integer"),
        (
            lambda: Shield((ZONE,), noise=0.1).begin(
                TwoRooms(noise=0.2), STATE.position, STATE.layout
            ),
            "noise: got 0.1 in the shield, takes the world's 0.2 or more",
        ),
        (
            lambda: Shield((ZONE,)).begin(WORLD, STATE.position * NAN, STATE.layout),
            "position: got values that are not finite",
        ),
        (
            lambda: guard().act(torch.zeros(3, 2), STATE.position),
            r"planned: got shape \[3, 2\], takes \[2, 2\]",
        ),
        (
            lambda: guard().act(torch.zeros(2, 2), STATE.position * NAN),
            "observed: got values that are not finite",
        ),
        (lambda: Lagrangian(SMALL, ZONE, rounds=0), "rounds: got 0, takes 1 or more"),
        (
            lambda: Lagrangian(CEM(effort=Effort()), ZONE),
            "planner: got one with an effort, takes one without",
        ),
        (lambda: Lagrangian(SMALL, ZONE, rate=0.0), "rate: got 0.0, takes more than 0"),
        (lambda: conformal.quantile(torch.zeros(3, 2), 0.5), r"scores: got shape \[3, 2\]"),
        (lambda: conformal.quantile(torch.tensor([NAN]), 0.5), "scores: got NaN"),
        (lambda: conformal.quantile(torch.zeros(3), 0.0), "level: got 0.0, takes more than 0"),
        (
            lambda: conformal.error(
                lambda x: x[:, 0], torch.zeros(4, 3, 2), torch.zeros(4, 3, 2), 0.5
            ),
            r"probe\(latents\): got shape \[12\], takes \[12, 2\]",
        ),
        (lambda: trial(WORLD, "storm", "none", SEEDS), "name: got 'storm', takes 'goal-seeking'"),
        (lambda: trial(WORLD, "goal-seeking", "hope", SEEDS), "form: got 'hope', takes 'none'"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_the_true_model_reads_no_frames():
    with pytest.raises(TypeError, match=r"^frames: got frames, TrueModel takes states"):
        MODEL.encode(WORLD.render(STATE))


@pytest.mark.parametrize("words", [{"horizon": 40}, {"horizon": 12, "iterations": 4}])
def test_a_horizon_that_the_effort_never_reaches(words):
    with pytest.raises(ValueError, match=r"^--planner: got horizon=.* which end at plans of "):
        report.planner(words)
