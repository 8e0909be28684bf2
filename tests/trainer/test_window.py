"""A maze seen through a window: the frame is a part of the map, and the map is the maze's."""

from __future__ import annotations

import pytest
import torch
from vicreg_jepa.worlds.maze import Maze
from vicreg_jepa.worlds.window import MazeWindow

SEEDS = torch.arange(40)


@pytest.mark.parametrize("cells", [2, 5, 8])
def test_a_frame_is_the_part_of_the_map_around_the_dot(cells):
    world = MazeWindow(cells=cells, things=cells)
    state = world.reset(SEEDS)
    assert world.size == 4 * cells + 1 == world.maze.size // 3
    whole = torch.zeros(len(SEEDS), 5 * world.size, 5 * world.size, 2, dtype=torch.uint8)
    whole[..., 1] = 255  # beyond the map is wall
    inner = slice(world.size, 4 * world.size)
    whole[:, inner, inner] = world.map(state)
    for number, (x, y) in enumerate(state.position.floor().long().tolist()):
        top, left = (place + world.size - world.size // 2 for place in (y, x))
        part = whole[number, top : top + world.size, left : left + world.size]
        assert torch.equal(world.render(state)[number], part)


def test_without_things_the_map_is_the_mazes():
    world = MazeWindow(cells=5, things=0)
    state = world.reset(SEEDS)
    same = Maze(cells=5).reset(SEEDS)
    assert torch.equal(world.map(state), Maze(cells=5).render(same))
    for _ in range(30):
        action = world.expert(state)
        assert torch.equal(action, Maze(cells=5).expert(same))
        state, same = world.step(state, action), Maze(cells=5).step(same, action)
        assert torch.equal(state.position, same.position)
    assert torch.equal(world.distance(state), Maze(cells=5).distance(same))


def test_things_lie_in_the_middles_of_different_cells():
    world = MazeWindow(cells=4, things=7)
    state = world.reset(SEEDS)
    things = world.facts(state)["things"]
    assert things.flatten(1).sum(dim=1).tolist() == [7] * len(SEEDS)
    assert len({tuple(one.flatten().tolist()) for one in things}) > 30
    empty = state._replace(layout=state.layout.clone())
    empty.layout[..., 2] = 0
    added = (world.map(state)[..., 0] != world.map(empty)[..., 0]).any(dim=0)
    for row in range(4):
        for column in range(4):
            square = added[12 * row + 5 : 12 * row + 10, 12 * column + 5 : 12 * column + 10]
            assert square.any()
            added[12 * row + 5 : 12 * row + 10, 12 * column + 5 : 12 * column + 10] = False
    assert not added.any()


def test_what_is_in_view():
    world = MazeWindow(cells=8)
    state = world.reset(SEEDS)
    reach = world.size // 2
    for offset, seen in ((reach, True), (reach + 1, False), (-reach, True), (-reach - 1, False)):
        place = state.position.floor() + torch.tensor([float(offset), 0.0])
        assert world.in_view(state, place).tolist() == [seen] * len(SEEDS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"things": 65}, "things: got 65, takes 0 to 64"),
        ({"things": 1.0}, "things: got 1.0, takes an integer"),
        ({"cells": 1}, "cells: got 1, takes 2 to 16"),
        ({"noise": 2}, "noise: got 2, takes 0 to 1"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        MazeWindow(**settings)
