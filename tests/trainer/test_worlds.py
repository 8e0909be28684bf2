"""The dynamics of the worlds, compared with the rendered walls: the dot never overlaps a wall, and
stops only where a longer move would overlap one.
"""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from vicreg_jepa.worlds import draws, paths, policies
from vicreg_jepa.worlds.contact_sheet import sheet
from vicreg_jepa.worlds.draws import Stream
from vicreg_jepa.worlds.episodes import rollout
from vicreg_jepa.worlds.maze import FAR, Maze
from vicreg_jepa.worlds.named import named
from vicreg_jepa.worlds.two_rooms import TwoRooms
from vicreg_jepa.worlds.world import MOST_NOISE, RADIUS, SPEED, World

WORLDS = (
    TwoRooms(),
    TwoRooms(wall="random"),
    TwoRooms(noise=0.5, wall="random", goal="any"),
    Maze(cells=2),
    Maze(noise=0.3),
)
world_of = pytest.mark.parametrize("world", WORLDS, ids=str)
MOST = SPEED + MOST_NOISE


def seeds(count: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + count)


def solid(world: World, state) -> np.ndarray:
    """bool [N, size, size], by the picture."""
    return world.render(state)[..., 1].numpy() > 0


def touches(walls: np.ndarray, position: np.ndarray) -> np.ndarray:
    """bool [N]: whether the dot's square at position, float64 [N, 2], overlaps a wall."""
    size = walls.shape[1]
    places = np.floor(position - RADIUS).astype(int)[:, :, None] + np.arange(2 * RADIUS + 1)
    overlaps = (places + 1 > position[:, :, None] - RADIUS) & (
        places < position[:, :, None] + RADIUS
    )
    outside = (places < 0) | (places >= size)
    places = places.clip(0, size - 1)
    numbers = np.arange(len(walls))[:, None, None]
    hit = walls[numbers, places[:, 1, :, None], places[:, 0, None, :]]
    hit = hit | outside[:, 1, :, None] | outside[:, 0, None, :]
    return (hit & overlaps[:, 1, :, None] & overlaps[:, 0, None, :]).any(axis=(1, 2))


def scattered(world: World, count: int, seed: int):
    """States all over the free space, a third of them pressed against walls and corners."""
    generator = np.random.default_rng(seed)
    state = world.reset(seeds(count, seed))
    walls = solid(world, state)
    position = state.position.numpy().astype(np.float64)
    for _ in range(20):
        drawn = generator.uniform(0, world.size, position.shape).astype(np.float32)
        free = ~touches(walls, drawn.astype(np.float64))
        position[free] = drawn[free]
    third = count // 3
    for _ in range(8):
        push = torch.from_numpy(generator.choice([-2.9, 0.0, 2.9], (third, 2))).float()
        moved = world.moved(torch.from_numpy(position[:third]).float(), state.layout[:third], push)
        position[:third] = moved.numpy()
    return state._replace(position=torch.from_numpy(position).float()), walls


# ------------------------------------------------------------------------------------- dynamics


@world_of
def test_walls_are_never_touched_and_only_walls_stop(world):
    """The way of a step is its corner; a push that was cut short ends at a wall."""
    state, walls = scattered(world, 3000, seed=3)
    assert bool(world.inside(state.position, state.layout).all())
    generator = np.random.default_rng(4)
    push = generator.uniform(-MOST, MOST, (3000, 2)).astype(np.float32)
    push[::3] = generator.choice([-MOST, 0, MOST], push[::3].shape)
    end = world.moved(state.position, state.layout, torch.from_numpy(push)).numpy()
    start = state.position.numpy()
    corner = np.stack([end[:, 0], start[:, 1]], axis=1)
    for first, second in ((start, corner), (corner, end)):
        for share in np.linspace(0, 1, 9):
            here = first.astype(np.float64) * (1 - share) + second.astype(np.float64) * share
            assert not touches(walls, here).any()
    for axis, before in ((0, start), (1, corner)):
        short = np.abs(end[:, axis] - (before[:, axis] + push[:, axis])) > 1e-5
        assert 0.02 < short.mean() < 0.8
        further = end.astype(np.float64) if axis else corner.astype(np.float64)
        further[:, axis] += 1e-3 * np.sign(push[:, axis])
        assert touches(walls[short], further[short]).all()


@examples(max_examples=20)
@given(st.integers(0, 2**40), st.sampled_from(WORLDS), st.floats(-9, 9), st.floats(-9, 9))
def test_inside_is_what_the_picture_says(seed, world, x, y):
    state = world.reset(seeds(64, seed))
    grid = torch.cartesian_prod(torch.linspace(0, world.size, 8), torch.linspace(0, world.size, 8))
    position = grid + torch.tensor([x, y])
    free = ~touches(solid(world, state), position.double().numpy())
    assert world.inside(position, state.layout).tolist() == free.tolist()


def put(world: World, x: float, y: float):
    return world.at(world.reset(seeds(1)), torch.tensor([[x, y]]))


@pytest.mark.parametrize(
    ("start", "action", "end"),
    [
        ((20.0, 40.0), (1.0, -0.5), (22.0, 39.0)),
        ((20.0, 40.0), (7.0, -7.0), (22.0, 38.0)),  # clamped
        ((28.0, 40.0), (1.0, 1.0), (29.0, 42.0)),  # against the wall at 31, along it
        ((37.0, 40.0), (-1.0, 0.0), (36.0, 40.0)),
        ((28.0, 14.0), (1.0, 0.0), (30.0, 14.0)),  # the door is 12 to 23: its edges let through
        ((28.0, 21.0), (1.0, 0.0), (30.0, 21.0)),
        ((28.0, 13.75), (1.0, 0.0), (29.0, 13.75)),
        ((28.0, 21.25), (1.0, 0.0), (29.0, 21.25)),
        ((32.0, 20.5), (0.0, 1.0), (32.0, 21.0)),  # inside of the door
        ((35.0, 20.5), (1.0, 1.0), (37.0, 22.5)),  # x first: it has left the door
        ((28.5, 22.0), (1.0, -1.0), (29.0, 20.0)),  # x first: the door was not open to it yet
        ((6.0, 59.5), (-1.0, 1.0), (5.0, 60.0)),
    ],
)
def test_contact_by_hand(start, action, end):
    world = TwoRooms()
    after = world.step(put(world, *start), torch.tensor([action]))
    assert after.position[0].tolist() == list(end)
    assert after.time.tolist() == [1]


def test_noise_is_uniform_within_its_bound():
    world = TwoRooms(noise=0.5)
    state = world.reset(seeds(4000))
    state = state._replace(position=torch.full_like(state.position, 20.0))
    moves = []
    for _ in range(5):
        after = world.step(state, torch.tensor([[0.25, -1.0]]).expand(4000, 2))
        moves.append(after.position - 20.0 - torch.tensor([0.5, -2.0]))
        state = after._replace(position=state.position)
    off = torch.stack(moves)
    assert off.abs().max() <= 0.5 + 1e-5
    assert off.max() > 0.499
    assert off.min() < -0.499
    assert abs(float(off.mean())) < 0.01
    assert abs(float(off.std()) - 0.5 / math.sqrt(3)) < 0.005
    flat = torch.cat([off[:, :, 0], off[:, :, 1]])  # of one episode, then of one step
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.07


@world_of
def test_an_episode_is_its_seed_alone(world):
    """The same in any batch, bit for bit, with its noise, its walk and its frames."""
    many = seeds(37, 5 << 32).flip(0)
    states, actions = rollout(world, policies.walk, world.reset(many), 30)
    for place in (0, 17, 36):
        alone, its = rollout(world, policies.walk, world.reset(many[place : place + 1]), 30)
        for state, one in zip(states, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(state.rows([place]), one, strict=True))
        assert all(torch.equal(a[place], b[0]) for a, b in zip(actions, its, strict=True))
        assert torch.equal(world.render(states[-1])[place], world.render(alone[-1])[0])
    starts = {tuple(place) for place in states[0].position.tolist()}
    assert len(starts) == 37


def test_numbers_are_those_of_splitmix():
    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, time in ((0, 0), (12345, 7), (2**62 + 3, 199)):
        key = mixed((mixed((seed + golden * int(Stream.NOISE)) % 2**64) + time) % 2**64)
        wanted = [(mixed((key + golden * n) % 2**64) >> 40) * 2.0**-24 for n in (1, 2, 3)]
        got = draws.uniform(torch.tensor([seed]), Stream.NOISE, torch.tensor([time]), 3)
        assert got[0].tolist() == wanted


# ------------------------------------------------------------------------------------- pictures


@world_of
def test_the_picture_shows_where_the_dot_is(world):
    state, _ = scattered(world, 300, seed=8)
    frames = world.render(state)
    assert frames.shape == (300, world.size, world.size, 2)
    assert frames.dtype == torch.uint8
    dot = frames[..., 0].double() / 255
    middle = torch.arange(world.size) + 0.5
    x, y = ((dot.sum(axis) * middle).sum(1) / dot.sum((1, 2)) for axis in (1, 2))
    assert (torch.stack([x, y], 1) - state.position).abs().max() < 0.03
    assert (dot.sum((1, 2)) - math.pi * RADIUS**2).abs().max() < 0.6
    assert dot.amax((1, 2)).min() == 1
    assert not ((dot == 1) & (frames[..., 1] > 0)).any()


def test_two_rooms_as_told():
    state = TwoRooms(wall="random").reset(seeds(50))
    frames = TwoRooms().render(state)
    for place, (wall, door) in enumerate(state.layout.tolist()):
        expected = np.zeros((65, 65), dtype=bool)
        expected[:3] = expected[-3:] = expected[:, :3] = expected[:, -3:] = True
        expected[:, wall : wall + 3] = True
        expected[max(door, 3) : min(door + 11, 62), wall : wall + 3] = False
        assert np.array_equal(frames[place, ..., 1].numpy() == 255, expected)
    facts = TwoRooms().facts(state)
    assert facts["wall"].tolist() == [wall + 1.5 for wall in state.layout[:, 0].tolist()]
    assert facts["door"].tolist() == [door + 5.5 for door in state.layout[:, 1].tolist()]
    right = state.position[:, 0] > facts["wall"]
    assert facts["room"].tolist() == (2 * right).tolist()
    assert bool(((state.goal[:, 0] > facts["wall"]) != right).all())
    assert len(set(state.layout[:, 0].tolist())) > 20
    for which, least, most in ((0, 15, 47), (1, 3, 51)):
        places = TwoRooms(wall="random").reset(seeds(3000)).layout[:, which]
        assert (int(places.min()), int(places.max())) == (least, most)


@pytest.mark.parametrize("cells", [2, 5, 9])
def test_a_maze_joins_its_cells_by_one_way(cells):
    world = Maze(cells=cells)
    state = world.reset(seeds(60))
    assert world.size == 12 * cells + 3
    assert state.layout.sum((1, 2, 3)).tolist() == [cells**2 - 1] * 60
    assert world._steps_to(torch.zeros(60, 2).long(), state.layout).max() < FAR
    assert not state.layout[:, :, -1, 0].any()
    assert not state.layout[:, -1, :, 1].any()
    if cells == 2:
        assert len({tuple(one) for one in state.layout.flatten(1).tolist()}) == 4


# ------------------------------------------------------------------------------- ways and actors


def ways(walls: np.ndarray) -> csr_matrix:
    """Costs between whole pixels, number x + size * y, in 32 directions: a move is possible where
    the dot may be in all cells of the grid that it goes through, each of which is free or not.
    """
    size = len(walls)
    y, x = (axis.ravel() / 2 for axis in np.mgrid[0 : 2 * size, 0 : 2 * size])
    free = ~touches(np.broadcast_to(walls, (len(x), size, size)), np.stack([x, y], axis=1))
    free = free.reshape(2 * size, 2 * size)
    y, x = (axis.ravel() for axis in np.mgrid[3 : size - 3, 3 : size - 3])
    rows, columns, costs = [], [], []
    for dx, dy in product(range(-3, 4), repeat=2):
        if math.gcd(dx, dy) != 1:
            continue
        clear = np.ones(len(x), dtype=bool)
        for share in np.arange(1, 24, 2) / 24:
            place = [
                2 * start if step == 0 else 2 * np.floor(start + share * step).astype(int) + 1
                for start, step in ((y, dy), (x, dx))
            ]
            clear &= free[place[0], place[1]]
        rows.append((x + size * y)[clear])
        columns.append(rows[-1] + dx + size * dy)
        costs.append(np.full(len(rows[-1]), math.hypot(dx, dy)))
    places = (np.concatenate(rows), np.concatenate(columns))
    return csr_matrix((np.concatenate(costs), places), shape=(size**2, size**2))


@pytest.mark.parametrize("world", [TwoRooms(wall="random", goal="any"), Maze(cells=4)], ids=str)
def test_the_shortest_way_is_that_of_a_search_on_the_pixels(world):
    """Dijkstra's search over whole pixels, whose 32 directions cost 1.4 % at most."""
    state, walls = scattered(world, 16, seed=11)
    state = state._replace(position=state.position.round(), goal=state.goal.round())
    starts, goals = ([tuple(p) for p in z.tolist()] for z in (state.position, state.goal))
    for place, way in enumerate(world.way(state)):
        distance = float(world.distance(state)[place])
        numbers = [int(x + world.size * y) for x, y in (starts[place], goals[place])]
        searched = dijkstra(ways(walls[place]), indices=numbers[0])[numbers[1]]
        assert distance - 1e-6 <= searched <= 1.014 * distance + 1e-6
        assert (way[0], way[-1]) == (starts[place], goals[place])
        for ends in pairwise(way):
            points = np.linspace(*ends, 30)
            assert not touches(np.broadcast_to(walls[place], (30, *walls[0].shape)), points).any()


def test_a_string_around_corners():
    gates = [paths.portal(0, 10, 0, 2, True), paths.portal(0, 14, 0, 2, True)]
    way = paths.taut((7, 6), gates, (17, 6))
    assert way == [(7, 6), (10, 2), (14, 2), (17, 6)]
    assert paths.length(way) == 14
    assert paths.taut((0, 1), gates, (20, 1)) == [(0, 1), (20, 1)]
    back = [paths.portal(0, 14, 0, 2, False), paths.portal(0, 10, 0, 2, False)]
    assert paths.taut((17, 6), back, (7, 6)) == way[::-1]


# World, and how many of 100 episodes who walks straight at the goal reaches at step 200.
@pytest.mark.parametrize(
    ("world", "least", "most"),
    [
        (TwoRooms(), 0.25, 0.55),
        (TwoRooms(wall="random"), 0.25, 0.55),
        (TwoRooms(wall="random", goal="any", noise=1.0), 0.6, 0.9),
        (Maze(noise=1.0), 0.2, 0.45),
    ],
    ids=str,
)
def test_the_expert_arrives_and_others_do_not(world, least, most):
    begun = world.reset(seeds(100, 9 << 32))
    share = {}
    for name in ("expert", "straight", "walk"):
        state = begun
        for _ in range(200):
            state = world.step(state, policies.POLICIES[name](world, state))
        share[name] = float(world.success(state).float().mean())
    assert share["expert"] == 1
    assert least < share["straight"] < most
    assert share["walk"] < 0.1
    assert bool((world.distance(begun) >= world.from_goal(begun) - 1e-4).all())


def test_the_expert_starts_anywhere():
    """From the door and from passages too, and it stays."""
    for world in (TwoRooms(wall="random", goal="any"), Maze()):
        state, _ = scattered(world, 200, seed=12)
        for _ in range(120):
            state = world.step(state, world.expert(state))
        assert bool((world.from_goal(state) < 0.01).all())


def test_a_walk_goes_through_the_door():
    world = TwoRooms()
    states, actions = rollout(world, policies.walk, world.reset(seeds(500)), 90)
    rooms = torch.stack([world.facts(state)["room"] for state in states])
    crossed = (rooms == 0).any(0) & (rooms == 2).any(0)
    assert 0.12 < crossed.float().mean() < 0.4
    acted = torch.stack(actions)
    assert acted.abs().max() <= 1
    next_to, apart = (
        torch.corrcoef(torch.stack([acted[:-n].flatten(), acted[n:].flatten()]))[0, 1]
        for n in (1, 13)
    )
    assert next_to > 0.8
    assert abs(apart) < 0.05


# ------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: named("Garden"), "world: got 'Garden', takes TwoRooms or Maze"),
        (lambda: named("TwoRooms", size=3), "size: is no setting of TwoRooms, which takes noise"),
        (lambda: TwoRooms(wall="soft"), "wall: got 'soft', takes fixed or random"),
        (lambda: TwoRooms(goal="none"), "goal: got 'none', takes other or any"),
        (lambda: TwoRooms(noise=-0.1), "noise: got -0.1, takes 0 to 1.0"),
        (lambda: TwoRooms(noise=float("nan")), "noise: got nan, takes 0 to 1.0"),
        (lambda: Maze(noise="much"), "noise: got 'much', takes a number"),
        (lambda: Maze(cells=1), "cells: got 1, takes 2 to 16"),
        (lambda: Maze(cells=2.5), "cells: got 2.5, takes an integer"),
        (lambda: put(TwoRooms(), 32.0, 40.0), r"position: got \[32.0, 40.0\] in environment 0"),
        (lambda: put(TwoRooms(), float("nan"), 40.0), "position: got"),
        (
            lambda: TwoRooms().step(TwoRooms().reset(seeds(2)), torch.zeros(2, 3)),
            r"action: got shape \[2, 3\], takes \[2, 2\]",
        ),
        (
            lambda: Maze().step(Maze().reset(seeds(2)), torch.full((2, 2), float("nan"))),
            "action: got values that are not finite",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_the_contact_sheet_is_drawn():
    picture = np.asarray(sheet(seed=7, steps=12))
    assert picture.shape[0] == 6 * 134
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
