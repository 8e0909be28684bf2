"""Planners: each finds its way with the true dynamics, draws the same for an environment alone and
beside others, thinks longer where the way is longer, and never prefers a broken energy.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from vicreg_jepa.planning import energies
from vicreg_jepa.planning.energies import Arrival, ControlCost, Function, GoalDistance, to_goal
from vicreg_jepa.planning.evaluate import episodes, followed, rank_correlation
from vicreg_jepa.planning.model import TrueModel
from vicreg_jepa.planning.noise import Draws, coloured
from vicreg_jepa.planning.planner import Effort, Planner, PlanRequest
from vicreg_jepa.planning.planners import CEM, ICEM, MPPI, CategoricalCEM, Gradient
from vicreg_jepa.worlds import policies
from vicreg_jepa.worlds.episodes import rollout
from vicreg_jepa.worlds.maze import Maze
from vicreg_jepa.worlds.two_rooms import TwoRooms
from vicreg_jepa.worlds.world import SPEED

ROOMS = TwoRooms(wall="random")
COMPASS = torch.tensor([[x, y] for x in (-1.0, 0.0, 1.0) for y in (-1.0, 0.0, 1.0)])
PLANNERS: dict[str, Planner] = {
    "CEM": CEM(),
    "ICEM": ICEM(),
    "MPPI": MPPI(),
    "Gradient": Gradient(),
    "CategoricalCEM": CategoricalCEM(choices=COMPASS),
}
each_planner = pytest.mark.parametrize("name", PLANNERS)


def seeds(count: int, first: int = 0) -> Tensor:
    return torch.arange(first, first + count)


def near(goal: Tensor) -> Arrival:
    return Arrival(goal, 2.0)


class Open:
    """A room without walls, of `size` dimensions: the latents are the sum of the actions."""

    def __init__(self, size: int = 2) -> None:
        self.actions = size

    def encode(self, frames: Tensor) -> Tensor:
        return frames.float().flatten(1)

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        return start[:, None, None] + SPEED * actions.cumsum(dim=2)


def task(count: int, world: TwoRooms = ROOMS):
    """(model, latents of the starts, latents of the goals)."""
    model, state = TrueModel(world), world.reset(seeds(count))
    return model, model.observe(state), model.observe(world.at(state, state.goal))


# ---------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("world", [ROOMS, Maze(cells=3)], ids=str)
def test_the_true_model_predicts_what_the_world_does(world):
    state = world.reset(seeds(9))
    states, actions = rollout(world, policies.walk, state, 30)
    model = TrueModel(world)
    path = model.rollout(model.observe(state), torch.stack(actions, dim=1)[:, None])
    for step in range(30):
        assert torch.equal(path[:, 0, step], model.observe(states[step + 1]))


# -------------------------------------------------------------------------------------- energies


def test_goal_distances_by_hand():
    path = torch.tensor([[[[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]]])  # [1, 1, 3, 2]
    actions, goal = torch.full((1, 1, 3, 2), 0.5), torch.zeros(1, 2)
    for at, norm, value in (
        ("sum", "l2", 16.0),
        ("end", "l2", 10.0),
        ("min", "l2", 1.0),
        ("sum", "l1", 22.0),
        ("end", "squared", 100.0),
    ):
        assert float(GoalDistance(goal, at, norm)(path, actions)) == pytest.approx(value)
    assert float(ControlCost(2.0)(path, actions)) == 3.0
    mixed = (
        2 * GoalDistance(goal, "end") + ControlCost() * 4 + (lambda path, actions: path[..., 0, 0])
    )
    assert float(mixed(path, actions)) == pytest.approx(20 + 6 + 3)
    assert float(GoalDistance(goal, most=4.0)(path, actions)) == pytest.approx(9.0)
    assert float(to_goal(goal, 4.0)(path, actions)) == pytest.approx(10 + 0.2 * 9)


def test_energies_select_their_environments():
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(5, 3, generator=generator)
    path, actions = torch.randn(5, 4, 6, 3, generator=generator), torch.zeros(5, 4, 6, 2)
    which = torch.tensor([3, 0])
    total = 2 * GoalDistance(goal, "min") + GoalDistance(goal, norm="l1") + ControlCost()
    some = total.rows(which)(path[which], actions[which])
    assert torch.equal(some, total(path, actions)[which])
    arrival = Arrival(goal, 1.5, at="any")
    assert torch.equal(arrival.rows(which)(path[which, 0]), arrival(path[:, 0])[which])


def test_arrival_at_the_end_and_on_the_way():
    path = torch.tensor([[[5.0], [0.5], [5.0]], [[5.0], [2.0], [0.9]]])
    goal = torch.zeros(2, 1)
    assert Arrival(goal, 1.0)(path).tolist() == [False, True]
    assert Arrival(goal, 1.0, at="any")(path).tolist() == [True, True]


def test_values_that_are_not_finite_become_infinite():
    values = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf]])
    path = torch.zeros(1, 4, 2, 3)
    seen = energies.evaluated(Function(lambda path, actions: values), path, path)
    assert seen.tolist() == [[1.0, torch.inf, torch.inf, torch.inf]]


# ----------------------------------------------------------------------------------------- draws


def test_draws_are_normal_and_belong_to_their_environment():
    draws = Draws(seeds(64), torch.full((64,), 7))
    normal = draws.normal(3, 50, 40)
    assert abs(float(normal.mean())) < 0.01
    assert float(normal.std()) == pytest.approx(1, abs=0.01)
    assert float((normal**4).mean()) == pytest.approx(3, abs=0.1)
    assert torch.equal(draws.rows(torch.tensor([5])).normal(3, 50, 40)[0], normal[5])
    others = (draws.normal(4, 50, 40), Draws(seeds(64), torch.full((64,), 8)).normal(3, 50, 40))
    for other in others:
        assert abs(float((normal * other).mean())) < 0.01


@pytest.mark.parametrize("colour", [0.0, 1.0, 2.0])
def test_coloured_noise_has_its_power_spectrum(colour):
    horizon = 32
    matrix = coloured(horizon, colour, torch.device("cpu"))
    noise = torch.randn(20000, horizon, generator=torch.Generator().manual_seed(0)) @ matrix
    assert torch.allclose(noise.std(dim=0), torch.ones(horizon), rtol=0, atol=0.03)
    power = torch.fft.rfft(noise, dim=1).abs().square().mean(dim=0)[1:-1]
    frequency = torch.arange(1, len(power) + 1)
    slope = torch.log(power[-1] / power[0]) / torch.log(frequency[-1] / frequency[0])
    assert float(slope) == pytest.approx(-colour, abs=0.05)


# -------------------------------------------------------------------------------------- planners


@each_planner
def test_a_plan_is_the_same_alone_and_beside_others(name):
    """Also with environments that leave the batch at different iterations."""
    model, start, goal = task(8, world=TwoRooms(wall="random", goal="any"))
    for effort in (None, Effort(horizon=4, growth=2, every=3)):
        planner = dataclasses.replace(PLANNERS[name], effort=effort, iterations=5, candidates=64)
        every = planner.plan(
            model, PlanRequest(start, to_goal(goal, 2.0), seeds(8), 5, arrival=near(goal))
        )
        for number in (0, 3, 7):
            row = slice(number, number + 1)
            alone = planner.plan(
                model,
                PlanRequest(
                    start[row],
                    to_goal(goal[row], 2.0),
                    seeds(1, number),
                    5,
                    arrival=near(goal[row]),
                ),
            )
            assert torch.allclose(alone.actions[0], every.actions[number], rtol=0, atol=1e-4)
            assert torch.allclose(alone.energy[0], every.energy[number], rtol=0, atol=1e-3)
            assert int(alone.iterations) == int(every.iterations[number])
            assert int(alone.rollout_steps) == int(every.rollout_steps[number])
        if effort is not None:
            assert len(set(every.iterations.tolist())) > 1


@each_planner
def test_the_plan_is_the_best_candidate_that_was_rolled_out(name):
    """Its energy and its path are those of its actions, and more iterations are not worse."""
    model, start, goal = task(12)
    energy = to_goal(goal, 2.0)
    plan = PLANNERS[name].plan(model, PlanRequest(start, energy, seeds(12), arrival=near(goal)))
    held = PLANNERS[name].held(plan.actions)[:, None]
    path = model.rollout(start, held)
    assert torch.equal(path[:, 0], plan.path)
    assert torch.equal(energy(path, held)[:, 0], plan.energy)
    assert torch.equal(near(goal)(plan.path), plan.arrived)
    assert bool((plan.actions.abs() <= 1).all())
    assert bool((plan.history[:, 1:] <= plan.history[:, :-1]).all())
    assert float((plan.history[:, 0] - plan.energy).mean()) > 1  # the search helps
    steps = PLANNERS[name].candidates * PLANNERS[name].horizon * PLANNERS[name].repeat
    assert plan.rollout_steps.tolist() == 12 * [steps * PLANNERS[name].iterations]


@each_planner
def test_each_planner_minimises_a_known_energy(name):
    """Without walls and with one action for each step, the best plan goes straight to the goal."""
    goal = torch.tensor([[8.0, -6.0], [2.0, 2.0]])
    fine = {"colour": 0.0, "least": 0.02} if name in ("CEM", "ICEM", "MPPI") else {}
    fine |= {"deviation": 0.2} if name == "MPPI" else {}
    planner = dataclasses.replace(
        PLANNERS[name], horizon=6, repeat=1, interval=1, iterations=40, candidates=256, **fine
    )
    plan = planner.plan(Open(), PlanRequest(torch.zeros(2, 2), GoalDistance(goal), seeds(2)))
    straight = torch.zeros(2, 2)
    least = []
    for _ in range(6):
        straight = straight + (goal - straight).clamp(-2, 2)
        least.append(torch.linalg.vector_norm(goal - straight, dim=1))
    bound = torch.stack(least).sum(dim=0)
    assert bool((plan.energy < 1.05 * bound + 1.0).all()), (plan.energy, bound)


def test_plans_of_discrete_actions_are_made_of_choices():
    model, start, goal = task(6)
    plan = PLANNERS["CategoricalCEM"].plan(model, PlanRequest(start, to_goal(goal, 2.0), seeds(6)))
    distance = (plan.actions[:, :, None] - COMPASS).abs().amax(dim=3).amin(dim=2)
    assert float(distance.max()) == 0


def test_actions_stay_in_any_projection():
    def disc(actions: Tensor) -> Tensor:
        return actions / torch.linalg.vector_norm(actions, dim=-1, keepdim=True).clamp(min=1)

    model, start, goal = task(4)
    for planner in (ICEM(project=disc, iterations=3), Gradient(project=disc, iterations=5)):
        plan = planner.plan(model, PlanRequest(start, to_goal(goal, 2.0), seeds(4)))
        length = torch.linalg.vector_norm(plan.actions, dim=2)
        assert 0.99 < float(length.max()) <= 1 + 1e-6


@each_planner
@pytest.mark.parametrize("kind", [torch.nan, torch.inf, -torch.inf])
def test_broken_energies_never_win(name, kind):
    """Half of the candidates have a broken energy. In environment 1 all have: its plan says so."""
    model, start, goal = task(3)
    honest = to_goal(goal, 2.0)

    class Half(energies.Energy):
        def __call__(self, path: Tensor, actions: Tensor) -> Tensor:
            value = honest(path, actions)
            broken = actions[:, :, 0, 0] > 0
            broken[1] = True
            return torch.where(broken, kind, value)

    plan = PLANNERS[name].plan(model, PlanRequest(start, Half(), seeds(3)))
    assert plan.finite.tolist() == [True, False, True]
    assert bool((plan.actions[[0, 2], 0, 0] <= 0).all())
    assert float(plan.actions[1].abs().max()) == 0
    assert bool(torch.isfinite(plan.actions).all())


def test_a_former_plan_is_shifted_and_used():
    model, start, goal = task(10)
    planner = ICEM()
    plan = planner.plan(model, PlanRequest(start, to_goal(goal, 2.0), seeds(10)))
    former = planner.shifted(plan.actions, 10)
    assert torch.equal(former[:, :-2], plan.actions[:, 2:])
    assert float(former[:, -2:].abs().max()) == 0
    short = dataclasses.replace(planner, iterations=1)
    again = short.plan(
        model, PlanRequest(start, to_goal(goal, 2.0), seeds(10), 1, former=plan.actions)
    )
    fresh = short.plan(model, PlanRequest(start, to_goal(goal, 2.0), seeds(10), 1))
    assert bool((again.energy <= plan.energy).all())
    assert float(fresh.energy.mean()) > float(again.energy.mean())
    cold = dataclasses.replace(short, warm=False)
    ignored = cold.plan(
        model, PlanRequest(start, to_goal(goal, 2.0), seeds(10), 1, former=plan.actions)
    )
    assert torch.equal(ignored.actions, fresh.actions)


# ---------------------------------------------------------------------------------------- effort


def test_the_horizon_grows_to_the_planners_own():
    effort = Effort(horizon=3, growth=2, every=2)
    assert [effort.horizon_at(number, 16) for number in range(8)] == [3, 3, 6, 6, 12, 12, 16, 16]
    assert effort.horizon_at(500, 16) == 16
    assert [Effort().horizon_at(2 * number, 16) for number in range(7)] == [3, 4, 5, 7, 9, 12, 16]


def test_an_environment_that_arrives_costs_no_more_rollout_steps():
    """The model is called with the rows of those that still search, and the steps are counted."""
    called = []

    class Counted(TrueModel):
        def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
            called.append(actions.shape[:3])
            return super().rollout(start, actions)

    _, start, goal = task(20)
    model = Counted(ROOMS)
    planner = ICEM(effort=Effort(), iterations=16)
    plan = planner.plan(
        model, PlanRequest(start, to_goal(goal, 2.0), seeds(20), arrival=near(goal))
    )
    rows = [shape[0] for shape in called]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 20 > rows[-1]
    total = sum(count * candidates * steps for count, candidates, steps in called)
    assert total == int(plan.rollout_steps.sum())
    assert bool((plan.arrived == near(goal)(plan.path.nan_to_num(9e9))).any())
    # A former plan that still arrives costs one rollout and no iteration.
    called.clear()
    done = plan.arrived.nonzero()[:, 0]
    again = planner.plan(
        model,
        PlanRequest(
            start[done],
            to_goal(goal[done], 2.0),
            seeds(20)[done],
            former=plan.actions[done],
            arrival=near(goal[done]),
        ),
    )
    assert bool(again.arrived.all())
    assert int(again.iterations.sum()) == 0
    assert torch.equal(again.actions, plan.actions[done])
    assert [tuple(shape) for shape in called] == [(len(done), 1, planner.horizon * planner.repeat)]


def test_rank_correlation_is_that_of_scipy():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 9, (40,), generator=generator)
    b = a + torch.randint(0, 9, (40,), generator=generator)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a.numpy(), b.numpy()).statistic)


@pytest.mark.parametrize("wall", ["fixed", "random"])
def test_effort_grows_with_the_difficulty(wall):
    """50 episodes, judged at step 200, beside the fixed budget and the straight line."""
    world = TwoRooms(wall=wall)
    model = TrueModel(world)
    thinking = episodes(model, world, ICEM(effort=Effort()), seeds(50), 2.0, keep=False)
    assert int(thinking.success.sum()) >= 48
    assert (
        int(thinking.success.sum()) >= int(followed(world, policies.straight, seeds(50)).sum()) + 20
    )
    assert rank_correlation(thinking.iterations, thinking.distance) >= 0.6
    planner = ICEM()
    plans = 200 // planner.interval
    budget = plans * planner.iterations * planner.candidates * planner.horizon * planner.repeat
    assert float(thinking.rollout_steps.double().mean()) <= 0.5 * budget


@pytest.mark.thorough
@pytest.mark.parametrize("wall", ["fixed", "random"])
def test_effort_costs_no_success(wall):
    """Within 2 points of the fixed budget, on 200 other episodes."""
    world = TwoRooms(wall=wall)
    model = TrueModel(world)
    thinking, full = (
        episodes(model, world, planner, seeds(200, 1000), 2.0, keep=False)
        for planner in (ICEM(effort=Effort()), ICEM())
    )
    assert int(thinking.success.sum()) >= int(full.success.sum()) - 4
    assert int(thinking.rollout_steps.sum()) <= 0.5 * int(full.rollout_steps.sum())
    assert rank_correlation(thinking.iterations, thinking.distance) >= 0.6


def test_episodes_follow_the_world_and_hold_at_the_goal():
    world = TwoRooms()
    result = episodes(TrueModel(world), world, ICEM(effort=Effort()), seeds(6), 2.0, keep=True)
    state = world.reset(seeds(6))
    for step in range(200):
        assert torch.equal(result.positions[:, step], state.position)
        state = world.step(state, result.actions[:, step])
    assert torch.equal(result.success, world.success(state))
    assert len(result.plans) == 20
    assert torch.equal(sum(plan.iterations for plan in result.plans), result.iterations)
    first = result.steps()
    assert bool(result.success.all())
    for number in range(6):
        after = result.positions[number, int(first[number]) + 30 :]  # three plans later
        distance = torch.linalg.vector_norm(after - result.goal[number], dim=1)
        assert float(distance.max()) <= 4
    some = episodes(TrueModel(world), world, ICEM(effort=Effort()), seeds(2, 3), 2.0, keep=False)
    assert torch.allclose(some.positions, result.positions[3:5], rtol=0, atol=1e-3)
    assert some.plans == []


@pytest.mark.parametrize("planner", [CEM, MPPI])
def test_one_candidate_is_the_former_plan(planner):
    small = planner(horizon=2, repeat=1, interval=1, candidates=1, elites=1, iterations=2)
    model = TrueModel(ROOMS)
    start = model.observe(ROOMS.reset(seeds(3)))
    former = torch.rand(3, 2, 2)
    plan = small.plan(model, PlanRequest(start, GoalDistance(start), seeds(3), former=former))
    torch.testing.assert_close(plan.actions, former)
