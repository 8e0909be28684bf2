"""Planning on several levels: landmarks count steps around walls, levels hand subgoals down, and
the shield stands below all of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from vicreg_jepa.models.landmarks import OFF, PASSAGE, Counts, Landmarks, counted
from vicreg_jepa.planning import zones
from vicreg_jepa.planning.energies import Arrival, to_goal
from vicreg_jepa.planning.evaluate import episodes
from vicreg_jepa.planning.guardrails import Zone
from vicreg_jepa.planning.hierarchy.energies import Reach, Steps
from vicreg_jepa.planning.hierarchy.levels import Held
from vicreg_jepa.planning.hierarchy.planner import Hierarchy, Level
from vicreg_jepa.planning.model import TrueModel
from vicreg_jepa.planning.planner import Effort, PlanRequest
from vicreg_jepa.planning.planners import ICEM
from vicreg_jepa.planning.shield import Shield
from vicreg_jepa.worlds.episodes import walks
from vicreg_jepa.worlds.maze import Maze
from vicreg_jepa.worlds.world import State

MAZE = Maze(cells=4, maze=2)
SPACING = 2.2  # pixels
LOW = ICEM(
    horizon=4, candidates=24, elites=6, kept=4, iterations=3,
    effort=Effort(horizon=1, growth=2.0, every=1),
)  # fmt: skip
HIGH = ICEM(
    horizon=4, repeat=1, interval=1, candidates=32, elites=6, kept=4, iterations=3, warm=False
)


def seeds(count: int) -> Tensor:
    return torch.arange(count) + (1 << 40)


@cache
def landmarks(world: Maze = MAZE, count: int = 120) -> Landmarks:
    states, _ = walks(world, 7, count, 90)
    flat = State(*(field.flatten(0, 1) for field in states))
    latents = TrueModel(world).observe(flat).unflatten(0, states.seed.shape)
    return counted(latents, SPACING)


def hierarchy(*lengths: int, world: Maze = MAZE) -> Hierarchy:
    levels = [Level(Held(TrueModel(world), n), HIGH, 10, 1.5 * n) for n in lengths or (12,)]
    return Hierarchy(LOW, tuple(levels), landmarks(world))


# ------------------------------------------------------------------------------------ landmarks


def corridor() -> Landmarks:
    """A walk along a U: from (0, 0) to (10, 0), up to (10, 2) and back to (0, 2)."""
    places = [(x, 0) for x in range(11)] + [(10, 1)] + [(x, 2) for x in range(10, -1, -1)]
    return counted(torch.tensor([places], dtype=torch.float32), 0.5)


def test_steps_are_counted_around_a_wall():
    u = corridor()
    start, across = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert len(u.places) == 23
    # 22 steps in two pieces of at most 16, each of which costs PASSAGE more.
    assert u.between(start, across).item() == 22 + 2 * PASSAGE
    assert u.between(start, torch.tensor([[3.0, 0.2]])).item() == 3 + PASSAGE
    assert u.between(start, start + 0.3).item() == 0
    # The walk was never taken back.
    assert torch.isinf(u.between(across, start)).all()


def test_a_latent_that_no_walk_came_near_is_far():
    """By OFF steps for each spacing that it is farther off than the walks' own latents."""
    u = corridor()
    start, wall = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.95]])
    assert u.nearest(start + 0.3)[1].item() == 0
    torch.testing.assert_close(u.nearest(wall)[1], torch.tensor([OFF * 0.9]))
    path = torch.stack([start, wall], dim=1)[:, None]  # [1, 1, 2, 2]
    torch.testing.assert_close(Steps(u, start)(path, path[..., :0]), torch.tensor([[OFF * 0.9]]))
    assert Reach(u, start, 4.0)(path, path[..., :0]).item() == 0
    assert torch.isinf(Reach(u, start, 3.0)(path, path[..., :0])).all()


def test_landmarks_cover_the_walks_and_lie_apart():
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(5, 200, 3, generator=generator).mul(0.3).cumsum(dim=1)
    its = counted(path, 0.8)
    assert torch.cdist(path.flatten(0, 1), its.places).amin(dim=1).amax() <= 0.8
    apart = torch.cdist(its.places, its.places).fill_diagonal_(torch.inf)
    assert apart.amin() > 0.8


def test_counts_of_parts_equal_those_of_the_whole():
    """Windows that come one after another, and frames that are left out."""
    path = torch.arange(12.0)[None, :, None]
    counts = Counts(1, 64)
    counts.spacing.fill_(0.5)
    counts.see(path[:, :8], range(8))
    counts.see(path[:, 7:], range(5))
    between = counts.landmarks().between(torch.tensor([[0.0]]), torch.tensor([[11.0]]))
    assert between.item() == 11 + 2 * PASSAGE
    counts.see(path[:, [0, 11]], (0, 11))
    between = counts.landmarks().between(torch.tensor([[0.0]]), torch.tensor([[11.0]]))
    assert between.item() == 11 + PASSAGE


def test_counted_steps_are_those_of_the_shortest_path():
    """Beside them the straight line, which walls break."""
    state = MAZE.reset(seeds(60))
    model = TrueModel(MAZE)
    goal = model.observe(MAZE.at(state, state.goal))
    steps = landmarks().between(model.observe(state), goal).double()
    assert torch.isfinite(steps).all()
    true = MAZE.distance(state)
    line = MAZE.from_goal(state).double()
    fit = [float(torch.corrcoef(torch.stack([x, true]))[0, 1]) for x in (steps, line)]
    assert fit[0] > 0.98 > 0.9 > fit[1], fit


# ------------------------------------------------------------------------------------- energies


def test_paths_out_of_reach_are_no_candidates():
    u = corridor()
    start = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    paths = torch.tensor([[[3, 0], [6, 0]], [[3, 0], [9, 0]], [[0, 1.5], [3, 0]]]).float()
    paths = paths[None].expand(2, -1, -1, -1)
    none = paths[..., :0]
    energy = Reach(u, start, 4 + PASSAGE)(paths, none)
    assert energy.tolist() == [[0.0, torch.inf, torch.inf], [torch.inf] * 3]
    assert Reach(u, start, 6 + PASSAGE)(paths, none)[0].tolist() == [0.0, 0.0, torch.inf]


def test_steps_to_the_goal_at_the_end_and_in_sum():
    u = corridor()
    goal = torch.tensor([[10.0, 0.0], [10.0, 1.0]])
    paths = torch.tensor([[[3, 0], [6, 0]]]).float()[None].expand(2, -1, -1, -1)
    none = paths[..., :0]
    end, total = (Steps(u, goal, at)(paths, none) for at in ("end", "sum"))
    assert end.tolist() == [[4 + PASSAGE], [5 + PASSAGE]]
    assert total.tolist() == [[11 + 2 * PASSAGE], [13 + 2 * PASSAGE]]
    row = torch.tensor([1])
    assert torch.equal(Steps(u, goal, "sum").rows(row)(paths[row], none[row]), total[row])


# ------------------------------------------------------------------------------------- planning


def test_the_hierarchy_reaches_what_flat_planning_does_not():
    """With the true dynamics; flat planning is that of the lowest level, with its own budget."""
    distance, model = MAZE.distance(MAZE.reset(seeds(24))), TrueModel(MAZE)
    far = seeds(24)[distance.argsort(descending=True)[:2]]
    both = episodes(model, MAZE, hierarchy(), far, 2.0, steps=150, keep=False)
    flat = episodes(model, MAZE, LOW, far, 2.0, steps=150, keep=False)
    assert both.success.double().mean() >= flat.success.double().mean() + 0.2
    assert both.success.all()
    assert both.rollout_steps.sum() < flat.rollout_steps.sum()


def request() -> tuple[TrueModel, PlanRequest]:
    """Of two near goals and two far ones."""
    model = TrueModel(MAZE)
    order = MAZE.distance(MAZE.reset(seeds(20))).argsort()
    state = MAZE.reset(seeds(20)[order[[0, 1, -2, -1]]])
    goal = model.observe(MAZE.at(state, state.goal))
    return model, PlanRequest(model.observe(state), None, state.seed, 0, arrival=Arrival(goal, 2.0))


def test_a_latent_of_a_level_is_the_goal_of_the_one_below():
    model, asked = request()
    its = hierarchy(12, 24)
    plan = its.plan(model, asked)
    low, high = plan.above
    assert low.between.any()
    assert high.between.any()
    start, reach = asked.start, its.levels[0].reach
    steps = its.landmarks.between(start[:, None].expand_as(low.path), low.path)[low.between]
    inside = steps <= reach
    assert inside[:, 0].all()
    for row, goal, path in zip(inside, low.goal[low.between], low.path[low.between], strict=True):
        assert torch.equal(goal, path[row.nonzero()[-1, 0]])
    subgoal = low.goal
    alone = LOW.plan(model, replace(asked, arrival=Arrival(subgoal, 2.0)))
    assert torch.equal(plan.actions, alone.actions)
    assert (plan.rollout_steps > alone.rollout_steps)[low.between].all()
    near = ~high.between
    assert torch.equal(high.goal[near], asked.arrival.goal[near])


def test_a_level_keeps_its_plan_until_the_next_is_due():
    model, asked = request()
    level = replace(hierarchy().levels[0], interval=20)
    its = Hierarchy(LOW, (level,), landmarks())
    first = its.plan(model, asked)
    kept = its.plan(model, replace(asked, time=10, above=first.above))
    anew = its.plan(model, replace(asked, time=20, above=first.above))
    assert torch.equal(kept.above[0].path, first.above[0].path)
    assert not torch.equal(anew.above[0].path, first.above[0].path)
    assert (kept.iterations < anew.iterations).any()


def test_a_plan_is_the_same_alone_and_beside_others():
    model, asked = request()
    together = hierarchy(12, 24).plan(model, asked)
    for number in (0, 3):
        row = torch.tensor([number])
        one = replace(
            asked, start=asked.start[row], seed=asked.seed[row], arrival=asked.arrival.rows(row)
        )
        alone = hierarchy(12, 24).plan(model, one)
        torch.testing.assert_close(alone.actions, together.actions[row])
        torch.testing.assert_close(alone.above[0].path, together.above[0].path[row])


def test_without_a_candidate_the_goal_is_handed_down():
    """A goal that no walk came near: the lowest level seeks it by itself."""
    model, asked = request()
    nowhere = Landmarks(asked.start[:1] + 100, torch.zeros(1, 1), 1.0)
    plan = replace(hierarchy(), landmarks=nowhere).plan(model, asked)
    assert not plan.above[0].between.any()
    assert torch.equal(plan.above[0].goal, asked.arrival.goal)
    assert torch.equal(plan.actions, LOW.plan(model, asked).actions)


# --------------------------------------------------------------------------------------- shield


def guarded(count: int, steps: int) -> None:
    world = replace(MAZE, noise=0.5)
    chosen = seeds(count)
    state = world.reset(chosen)
    goal, start = zones.at_the_goal(world, state), zones.beside_the_start(world, state)
    even = (torch.arange(count) % 2 == 0)[:, None]  # the zones of the others lie beside the start
    radius = torch.where(even[:, 0], goal.radius, start.radius)
    zone = Zone(torch.where(even, goal.centre, start.centre), radius)
    its, model = hierarchy(), TrueModel(world)
    shield = Shield((zone,), noise=0.5)
    safe = episodes(model, world, its, chosen, 2.0, steps, shield=shield, keep=False)
    free = episodes(model, world, its, chosen, 2.0, steps, keep=False)
    assert (safe.clearance(zone) >= 0).all()
    assert (free.clearance(zone) < 0).any()
    assert (safe.changed > 0).any()


def test_no_zone_is_entered_below_all_levels():
    guarded(6, 30)


@pytest.mark.thorough
def test_three_hundred_episodes_enter_no_zone():
    guarded(300, 200)


# ------------------------------------------------------------------------------------ bad input


def test_bad_settings_are_named():
    model = TrueModel(MAZE)
    level = hierarchy().levels[0]
    with pytest.raises(ValueError, match=r"^levels: got none"):
        Hierarchy(LOW, (), landmarks())
    with pytest.raises(ValueError, match=r"^interval: got 15, takes a multiple"):
        Hierarchy(LOW, (replace(level, interval=15),), landmarks())
    with pytest.raises(ValueError, match=r"^planner: got repeat 5"):
        Level(model, replace(LOW, effort=None), 10, 5.0)
    with pytest.raises(ValueError, match=r"^planner: got one with effort"):
        Level(model, replace(HIGH, effort=Effort()), 10, 5.0)
    with pytest.raises(ValueError, match=r"^reach: got 0"):
        Level(model, HIGH, 10, 0.0)
    with pytest.raises(ValueError, match=r"^steps: got 0"):
        Held(model, 0)
    with pytest.raises(ValueError, match=r"^spacing: got 0.1, .* more than 5 landmarks"):
        counted(torch.arange(8.0)[None, :, None], 0.1, most=5)
    with pytest.raises(ValueError, match=r"^walks: got shape \[2, 1, 3\]"):
        counted(torch.zeros(2, 1, 3), 1.0)
    with pytest.raises(ValueError, match=r"^walks: got values that are not finite"):
        counted(torch.full((2, 2, 3), torch.nan), 1.0)
    with pytest.raises(ValueError, match=r"^maze: got -2"):
        Maze(maze=-2)


def test_bad_requests_are_named():
    model, asked = request()
    its = hierarchy()
    with pytest.raises(ValueError, match=r"^energy: got one, takes None"):
        its.plan(model, replace(asked, energy=to_goal(asked.arrival.goal, 2.0)))
    with pytest.raises(ValueError, match=r"^arrival: got None"):
        its.plan(model, replace(asked, arrival=None))
    with pytest.raises(ValueError, match=r"^time: got a tensor"):
        its.plan(model, replace(asked, time=torch.zeros(4, dtype=torch.int64)))
    above = its.plan(model, asked).above
    with pytest.raises(ValueError, match=r"^above: got 1 levels, takes none or 2"):
        hierarchy(12, 24).plan(model, replace(asked, above=above))
    with pytest.raises(ValueError, match=r"^above: got levels above, takes none"):
        LOW.plan(model, replace(asked, above=above))
    with pytest.raises(ValueError, match=r"^energy: got None without an arrival"):
        replace(LOW, effort=None).plan(model, replace(asked, arrival=None))


def test_a_fixed_maze_is_the_same_in_all_episodes():
    fixed, drawn = Maze(cells=4, maze=5).reset(seeds(9)), Maze(cells=4).reset(seeds(9))
    assert torch.equal(fixed.layout, fixed.layout[:1].expand_as(fixed.layout))
    assert torch.equal(fixed.layout[0], Maze(cells=4).reset(torch.tensor([5])).layout[0])
    assert torch.equal(fixed.position, drawn.position)
    assert torch.equal(fixed.goal, drawn.goal)
    assert len(drawn.layout.flatten(1).unique(dim=0)) > 1
