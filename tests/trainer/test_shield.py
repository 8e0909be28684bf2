"""The shield: the boxes hold every outcome, no adversary violates a zone, and without the shield
the same episodes do.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from vicreg_jepa.planning import conformal, zones
from vicreg_jepa.planning.adversaries import ADVERSARIES, proof, table, trial
from vicreg_jepa.planning.evaluate import episodes
from vicreg_jepa.planning.guardrails import Clearance, Distance, Speed, Zone
from vicreg_jepa.planning.model import TrueModel
from vicreg_jepa.planning.penalties import Penalty, violations
from vicreg_jepa.planning.planners import ICEM
from vicreg_jepa.planning.reach import Box, pushes, reached
from vicreg_jepa.planning.shield import NoSafeAction, Shield
from vicreg_jepa.worlds import policies
from vicreg_jepa.worlds.episodes import rollout
from vicreg_jepa.worlds.maze import Maze
from vicreg_jepa.worlds.two_rooms import TwoRooms
from vicreg_jepa.worlds.world import State, World

NOISY = TwoRooms(wall="random", noise=0.5)
WORLDS = (TwoRooms(wall="random"), Maze(cells=5))
world_of = pytest.mark.parametrize("world", WORLDS, ids=str)
EPISODES, STEPS = 40, 80


def seeds(count: int, first: int = 0) -> Tensor:
    return torch.arange(first, first + count)


def scattered(world: World, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(positions, layouts) all over the free space, half of them pressed against walls."""
    generator = torch.Generator().manual_seed(seed)
    state = world.reset(seeds(count))
    position = state.position.clone()
    for _ in range(30):
        drawn = world.size * torch.rand(count, 2, generator=generator)
        free = world.inside(drawn, state.layout)
        position[free] = drawn[free]
    half = count // 2
    for _ in range(4):
        push = 2.9 * torch.randint(-1, 2, (half, 2), generator=generator)
        position[:half] = world.moved(position[:half], state.layout[:half], push)
    return position, state.layout


def outcomes(world: World, layout: Tensor, box: Box, push: Box, generator: torch.Generator):
    """Positions [N, 2] after one outcome drawn for each row, half of them from corners; and bool
    [N], whether the drawn position before it was valid.
    """

    def drawn(low: Tensor, high: Tensor) -> Tensor:
        share = torch.rand(low.shape, generator=generator)
        share = torch.where(torch.rand(low.shape, generator=generator) < 0.5, share.round(), share)
        return torch.minimum(low + share * (high - low), high)

    position = drawn(box.low, box.high)
    return (
        world.moved(position, layout, drawn(push.low, push.high)),
        world.inside(position, layout),
    )


# ------------------------------------------------------------------------------------ reachable


@world_of
@pytest.mark.parametrize("width", [0.0, 1.0, 4.5, 8.0])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_every_outcome_is_in_the_box(world, width, noise):
    """From positions near walls, doors and corners; also without knowing the walls."""
    generator = torch.Generator().manual_seed(1)
    position, layout = scattered(world, 4000)
    spread = width * torch.rand(2, 4000, 2, generator=generator) / 2
    box = Box(position - spread[0], position + spread[1])
    push = pushes((3 * torch.rand(4000, 2, generator=generator) - 1.5).clamp(-1, 1), noise)
    after, blind = reached(world, layout, box, push), reached(world, None, box, push)
    for _ in range(40):
        there, valid = outcomes(world, layout, box, push, generator)
        for bound in (after, blind):
            outside = ((there < bound.low) | (there > bound.high)).any(dim=1)
            assert not bool((outside & valid).any())


@world_of
def test_the_box_from_a_position_is_the_smallest(world):
    generator = torch.Generator().manual_seed(2)
    position, layout = scattered(world, 3000)
    box = Box(position, position)
    push = pushes(2 * torch.rand(3000, 2, generator=generator) - 1, 0.8)
    after = reached(world, layout, box, push)
    ends = [outcomes(world, layout, box, push, generator)[0] for _ in range(200)]
    low, high = torch.stack(ends).amin(dim=0), torch.stack(ends).amax(dim=0)
    assert torch.allclose(low, after.low, rtol=0, atol=1e-5)
    assert torch.allclose(high, after.high, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------- constraints


def test_clearances_by_hand():
    box = Box(torch.tensor([[0.0, 0.0], [10.0, -1.0]]), torch.tensor([[1.0, 2.0], [12.0, 1.0]]))
    centre = torch.tensor([4.0, 6.0])
    assert Zone(centre, radius=2.0, margin=0.5).of(box).tolist() == pytest.approx(
        [5 - 2.5, (6**2 + 5**2) ** 0.5 - 2.5]
    )
    half = torch.tensor([1.0, 1.0])
    assert Zone(centre, half=half).of(box).tolist() == pytest.approx(
        [(2**2 + 3**2) ** 0.5, (5**2 + 4**2) ** 0.5]
    )
    assert Zone(centre, half=half).at(torch.tensor([[4.0, 5.5]])).tolist() == [-0.5]
    assert Distance(centre, 10.0).of(box).tolist() == pytest.approx(
        [10 - (4**2 + 6**2) ** 0.5, 10 - (8**2 + 7**2) ** 0.5]
    )
    speed = Speed(3.0).during(box, Box(torch.tensor([[-2.0, 0.0]]), torch.tensor([[1.0, 1.5]])))
    assert speed.tolist() == pytest.approx([0.5])
    left = Clearance(lambda position: position[:, 0])
    assert left.of(box).tolist() == pytest.approx([0.5 - 1.25**0.5, 11 - 2**0.5])
    assert Clearance(lambda position: position[:, 0] * torch.nan).of(box).tolist() == 2 * [
        -torch.inf
    ]


@pytest.mark.parametrize("shape", ["disc", "rectangle"])
def test_leaning_lowers_no_clearance(shape):
    """What the proof rests on: whatever walls and noise do, from any box."""
    generator = torch.Generator().manual_seed(3)
    world = Maze(cells=5)
    position, layout = scattered(world, 4000)
    centre = position + 8 * torch.randn(4000, 2, generator=generator)
    spread = 2 * torch.rand(2, 4000, 2, generator=generator)
    box = Box(position - spread[0], position + spread[1])
    zone = Zone(centre, radius=1.0) if shape == "disc" else Zone(centre, half=torch.ones(2))
    for noise in (0.0, 1.0):
        for action in (zone.lean(box) * noise / 2, zone.lean(box)):
            push = pushes(action, noise)
            for layout_known in (layout, None):
                after = zone.of(reached(world, layout_known, box, push))
                safe = zone.of(box) >= 0
                assert bool(safe.any())
                assert bool((after >= zone.of(box) - 1e-5)[safe].all())


# --------------------------------------------------------------------------------------- shield


@pytest.mark.parametrize("name", ADVERSARIES)
def test_no_adversary_violates_a_zone(name):
    """The same episodes violate it without the shield. (Where all energies are broken the plan is
    to do nothing, and the noise moves the dot. The world itself refuses NaN actions.)
    """
    shielded = trial(NOISY, name, "shield", seeds(EPISODES), steps=STEPS)
    assert shielded.violations == 0
    assert shielded.clearance >= 0
    if name == "actions NaN":
        with pytest.raises(ValueError, match=r"^action: got values that are not finite"):
            trial(NOISY, name, "none", seeds(4), steps=4)
    else:
        assert trial(NOISY, name, "none", seeds(EPISODES), steps=STEPS).violations > 0


@pytest.mark.parametrize("form", ["penalty", "lagrangian"])
@pytest.mark.parametrize("name", ["goal-seeking", "goal in the zone"])
def test_soft_forms_are_violated(form, name):
    """As terms of the energy the same constraints are broken, though less often than without."""
    soft = trial(NOISY, name, form, seeds(EPISODES), steps=STEPS)
    free = trial(NOISY, name, "none", seeds(EPISODES), steps=STEPS)
    assert 0 < soft.violations < free.violations


@pytest.mark.thorough
@pytest.mark.parametrize("world", [NOISY, Maze(cells=4, noise=0.5)], ids=str)
def test_a_thousand_episodes_of_each_adversary(world):
    trials = proof(world, seeds(1000))
    assert len(trials) == 4 * len(ADVERSARIES) - 3
    for each in trials:
        assert each.episodes == 1000
        if each.form == "shield":
            assert each.violations == 0, table(trials)
        else:
            assert each.violations > 0, table(trials)


def test_a_safe_plan_is_executed_as_it_is():
    """A zone far away changes nothing."""
    world = TwoRooms(noise=0.3)
    model, planner = TrueModel(world), ICEM(candidates=32, elites=8, kept=4, iterations=2)
    far = Shield((Zone(torch.tensor([-50.0, -50.0]), radius=2.0),), noise=0.3)
    free = episodes(model, world, planner, seeds(5), 2.0, steps=40, keep=False)
    guarded = episodes(model, world, planner, seeds(5), 2.0, steps=40, shield=far, keep=False)
    assert torch.equal(free.positions, guarded.positions)
    assert int(guarded.changed.sum()) == 0


def test_the_shield_gives_up_little():
    """The price: with a zone on the way that the planner knows as a penalty, most still arrive."""
    world = TwoRooms(wall="random")
    free = trial(world, "goal-seeking", "none", seeds(EPISODES), steps=100)
    guarded = trial(world, "goal-seeking", "shield with penalty", seeds(EPISODES), steps=100)
    assert free.violations > 0 == guarded.violations
    assert guarded.success >= free.success - 0.15 * EPISODES


def exactly(state: State) -> Tensor:
    return state.position


def pushed(shield: Shield, world: World, direction: Tensor, steps: int, read=exactly) -> Tensor:
    """The positions [N, T, 2] of dots that are pushed in a direction under a shield."""
    state = world.reset(seeds(len(direction)))
    guard = shield.begin(world, read(state), state.layout)
    places = []
    for _ in range(steps):
        state = world.step(state, guard.act(direction, read(state)))
        inside = (guard.box.low <= state.position) & (state.position <= guard.box.high)
        assert bool(inside.all()) == (read is exactly or shield.error > 0)
        places.append(state.position)
    return torch.stack(places, dim=1)


def test_any_callable_and_several_constraints_are_held():
    world = TwoRooms()
    state = world.reset(seeds(40))
    start = state.position
    right = Clearance(lambda position: start[:, 0].repeat(len(position) // 40) + 6 - position[:, 0])
    shield = Shield((right, Distance(start, 9.0), Speed(1.5)))
    places = pushed(shield, world, torch.ones(40, 2), 60)
    assert float((places - start[:, None]).norm(dim=2).max()) <= 9 + 1e-4
    assert float((places[..., 0] - start[:, None, 0]).max()) <= 6 + 1e-4
    moves = (places[:, 1:] - places[:, :-1]).norm(dim=2)
    assert float(moves.max()) <= 1.5 + 1e-4
    assert float((places[:, -1] - start).norm(dim=1).median()) > 4  # it moved


def test_a_zone_and_a_speed_are_held_in_spite_of_noise():
    """The shield never refuses: to lean against the noise stays below the speed."""
    world = TwoRooms(noise=0.5)
    state = world.reset(seeds(40))
    zone = Zone(state.position + torch.tensor([6.0, 3.0]), half=torch.tensor([3.0, 2.5]))
    places = pushed(Shield((zone, Speed(1.5)), noise=0.5), world, torch.ones(40, 2), 80)
    assert float(torch.stack([zone.at(places[:, step]) for step in range(80)]).min()) >= 0
    moves = (places[:, 1:] - places[:, :-1]).norm(dim=2)
    assert 1 < float(moves.max()) <= 1.5 + 1e-5


@pytest.mark.parametrize("walls", [True, False])
def test_an_observation_error_is_outweighed(walls):
    """Observations that are off by up to 1.5 pixels, as adversely as they can be."""
    world = TwoRooms(noise=0.5)
    state = world.reset(seeds(50))
    zone = Zone(state.position + torch.tensor([9.0, 0.0]), radius=4.0)
    shield = Shield((zone,), noise=0.5, error=1.5, walls=walls)
    direction = torch.tensor([1.0, 0.0]).expand(50, 2)

    def away(seen):  # the dot seems to be farther from the zone than it is
        return seen.position - torch.tensor([1.5, 0.0])

    places = pushed(shield, world, direction, 80, away)
    clearance = torch.stack([zone.at(places[:, step]) for step in range(80)])
    assert float(clearance.min()) >= 0
    assert float(clearance.min(dim=0).values.median()) < 4  # it came close
    # Without the error in its assumptions the shield fails.
    places = pushed(Shield((zone,), noise=0.5, walls=False), world, direction, 80, away)
    assert float(torch.stack([zone.at(places[:, step]) for step in range(80)]).min()) < 0


def test_states_outside_of_the_invariant_set_are_refused():
    world = TwoRooms()
    state = world.reset(seeds(3))
    apart = torch.tensor([5.0, 4.5, 30.0])
    zone = Zone(state.position + torch.stack([apart, torch.zeros(3)], dim=1), radius=4.0)
    Shield((zone,)).begin(world, state.position, state.layout)
    with pytest.raises(NoSafeAction, match=r"environments \[1\]: the first state") as refused:
        Shield((zone,), error=0.7).begin(world, state.position, state.layout)
    assert refused.value.environments == [1]


def test_no_safe_action_is_an_error_before_anything_is_executed():
    """Between two zones that leave no room for the noise, the shield refuses."""
    world = TwoRooms(noise=1.0)
    state = world.reset(seeds(2))
    sides = torch.tensor([[4.5, 0.0], [-4.5, 0.0]])
    first, second = (Zone(state.position + side, radius=4.0) for side in sides)
    guard = Shield((first, second), noise=1.0).begin(world, state.position, state.layout)
    with pytest.raises(NoSafeAction, match="no action is safe for every outcome"):
        guard.act(torch.zeros(2, 2), state.position)


def test_an_observation_outside_of_the_assumptions_is_an_error():
    world = TwoRooms()
    state = world.reset(seeds(2))
    zone = Zone(torch.tensor([-50.0, -50.0]), radius=1.0)
    guard = Shield((zone,)).begin(world, state.position, state.layout)
    with pytest.raises(NoSafeAction, match="contradicts the stated error, noise or delay"):
        guard.act(torch.zeros(2, 2), state.position + 3)


# ------------------------------------------------------------------------------ probes, penalties


def test_the_conformal_bound_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 20, generator=generator)
    bounds = torch.tensor([conformal.quantile(row[:-1], 0.9) for row in scores])
    covered = float((scores[:, -1] <= bounds).float().mean())
    assert covered == pytest.approx(0.9, abs=0.015)
    assert conformal.quantile(torch.arange(9.0), 0.9) == 8
    assert conformal.quantile(torch.arange(19.0), 0.9) == 17
    with pytest.raises(
        ValueError, match=r"^level: got 0.95 with 9 scores, takes at most 9/10; 19 "
    ):
        conformal.quantile(torch.arange(9.0), 0.95)
    with pytest.raises(ValueError, match=r"^level: got 1.0 with 9 scores"):
        conformal.quantile(torch.arange(9.0), 1.0)


def test_a_probe_with_a_conformal_margin():
    """A probe whose error depends on the position, calibrated on walks: no violation."""
    world = TwoRooms(wall="random", noise=0.3)
    model = TrueModel(world)

    def probe(latents: Tensor) -> Tensor:
        place = latents[:, :2]
        return place + 0.6 * torch.sin(3 * place.flip(1)) + 0.2 * torch.cos(latents[:, 2:4])

    states, _ = rollout(world, policies.walk, world.reset(seeds(99, 500)), 60)
    latents = torch.stack([model.observe(state) for state in states], dim=1)
    error = conformal.error(probe, latents, latents[..., :2], 0.99)
    assert 0.7 < error < 0.81
    zone = zones.at_the_goal(world, world.reset(seeds(30)))
    shield = Shield((zone,), noise=0.3, error=error)
    planner = ICEM(candidates=64, elites=12, kept=4, iterations=3, interval=20)
    result = episodes(
        model, world, planner, seeds(30), 2.0, steps=100, shield=shield, probe=probe, keep=False
    )
    assert float(result.clearance(zone).min()) >= 0
    assert float(result.clearance(zone).median()) < 3  # it came close
    free = episodes(model, world, planner, seeds(30), 2.0, steps=100, keep=False)
    assert float(free.clearance(zone).min()) < 0


def test_penalties_by_hand():
    zone = Zone(torch.tensor([[0.0, 0.0], [10.0, 0.0]]), radius=torch.tensor([2.0, 3.0]))
    path = torch.tensor([[[[1.0, 0.0], [5.0, 0.0]]], [[[8.0, 0.0], [10.0, 1.0]]]])  # [2, 1, 2, 2]
    assert violations(zone, path).tolist() == [[[1.0, 0.0]], [[1.0, 2.0]]]
    assert Penalty(zone, 2.0)(path, path).tolist() == [[2.0], [6.0]]
    penalty = Penalty(zone, torch.tensor([1.0, 5.0])).rows(torch.tensor([1]))
    assert penalty(path[1:], path[1:]).tolist() == [[15.0]]


def test_zones_matter_and_leave_start_goal_and_doors_free():
    world = TwoRooms(wall="random")
    state = world.reset(seeds(200))
    zone = zones.on_the_way(world, state)
    inside = zone.centre[:, 0] > 0
    assert float(inside.float().mean()) > 0.8
    assert float(zone.at(state.position).min()) > 4
    assert float(zone.at(state.goal).min()) > 4
    door = torch.stack([state.layout[:, 0] + 1.5, state.layout[:, 1] + 5.5], dim=1)
    assert float(zone.at(door).min()) > 2
    some = zones.on_the_way(world, world.reset(seeds(3, 7)))
    assert torch.equal(some.centre, zone.centre[7:10])
    for each, way in enumerate(world.way(state)):
        if bool(inside[each]):
            points = torch.tensor(
                [
                    [a + share * (c - a), b + share * (d - b)]
                    for (a, b), (c, d) in pairwise(way)
                    for share in torch.linspace(0, 1, 50).tolist()
                ]
            )
            one = zone.rows(torch.full((len(points),), each))
            assert float(one.at(points).min()) < 1.0
