"""Colour images of the worlds: a red dot, a green goal, dark walls on white."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vicreg_jepa.worlds.world import State, World

PAPER = (255, 255, 255)
WALL = (60, 66, 80)
DOT = (206, 40, 40)
GOAL = (40, 150, 70)


def painted(world: World, state: State) -> NDArray[np.uint8]:
    """[N, size, size, 3]"""
    frames = world.render(state)
    goal = world.render(world.at(state, state.goal))[..., 0]
    return mixed(frames, goal)


def mixed(frames: Tensor, goal: Tensor | None = None) -> NDArray[np.uint8]:
    """[N, H, W, 3]. frames: [N, H, W, 2]; goal: [N, H, W], the dot's channel at the goal."""
    picture = np.empty((*frames.shape[:3], 3), dtype=np.float32)
    picture[:] = PAPER
    layers = [(frames[..., 1], WALL), (frames[..., 0], DOT)]
    if goal is not None:
        layers.insert(1, (goal, GOAL))
    for layer, colour in layers:
        cover = layer.numpy()[..., None] / np.float32(255)
        picture += cover * (np.array(colour, dtype=np.float32) - picture)
    return picture.round().astype(np.uint8)
