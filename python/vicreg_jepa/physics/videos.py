"""Possible videos: a mixture of scenes in which things fall, bounce, roll, collide and hide.

Half of them are staged like the matched pairs, so a model has seen every property obeyed in the
kinds of scenes in which the tests break it; the rest is more varied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.physics.properties import PROPERTIES, STAGED
from vicreg_jepa.physics.render import frames
from vicreg_jepa.physics.scene import (
    COLOURS,
    FRAMES,
    SIZE,
    Block,
    Panel,
    Scene,
    Thing,
    simulate,
    upright,
)
from vicreg_jepa.physics.stage import (
    Generator,
    chance,
    choose,
    depth,
    moving,
    side_walls,
    stage,
    standing,
    thing,
    thrown,
    uniform,
    wall,
)
from vicreg_jepa.physics.unpredictable import of_possible

TRAINING = 0  # the random stream; quadruplets have others


class Sample(NamedTuple):
    """video: uint8 [T, 64, 64, 3]; record: a description for JSON."""

    video: NDArray[np.uint8]
    record: dict[str, Any]


def possible(seed: int, noise: float = 0.0) -> Sample:
    """The video of the seed. noise: the strength of what cannot be predicted, from 0 to 1
    (unpredictable.py). Raises ValueError if the seed is negative or the noise is another number.
    """
    if seed < 0:
        raise ValueError(f"seed: got {seed}, takes an integer from 0")
    disturbance = of_possible(seed, noise)
    rng = np.random.default_rng([TRAINING, seed])
    family = choose(rng, list(FAMILIES)) if chance(rng, 0.5) else "staged"
    scene = FAMILIES.get(family, staged)(rng)
    if chance(rng, 0.5):
        scene = scene.mirrored()
    clip = simulate(scene)
    video = disturbance(frames(clip), range(FRAMES))
    return Sample(video, {"seed": seed, "family": family, **clip.record()})


def staged(rng: Generator) -> Scene:
    """One of the two possible scenes of a matched pair."""
    pair = PROPERTIES[choose(rng, STAGED)](rng, chance(rng, 0.5))
    return choose(rng, (pair.first, pair.second))


def drop(rng: Generator) -> Scene:
    """One to four things fall and turn, each in its own column; some hit a shelf."""
    scene = _walled(rng, stage(rng))
    count = int(rng.integers(1, 5))
    columns = _columns(rng, count)
    things = []
    for x in columns:
        body = thing(rng, radius=(4.2, 5.8) if count < 3 else (3.8, 4.8))
        body = replace(body, angle=uniform(rng, -np.pi, np.pi), spin=uniform(rng, -0.1, 0.1))
        down = uniform(rng, -1.5, 1.0)
        things.append(thrown(body, x, uniform(rng, 9, 24), uniform(rng, -0.6, 0.6), down))
    if chance(rng, 0.4):
        left, top = uniform(rng, 8, 30), uniform(rng, 35, 40)
        shelf = upright("shelf", left, left + uniform(rng, 18, 28), top, top + uniform(rng, 3, 4))
        scene = replace(scene, blocks=(*scene.blocks, shelf))
    return _coloured(rng, _panels(rng, replace(scene, things=tuple(things)), 0.4))


def roll(rng: Generator) -> Scene:
    """One or two things move along the floor, behind panels, towards a wall or out."""
    scene = stage(rng)
    if chance(rng, 0.5):
        scene = replace(scene, blocks=side_walls())
    elif chance(rng, 0.5):
        scene = replace(
            scene, blocks=(wall(rng, scene, uniform(rng, 40, 54), uniform(rng, 14, 32)),)
        )
    things = [_mover(rng, scene, uniform(rng, 9, 13), uniform(rng, 0.9, 2.6))]
    if chance(rng, 0.4):
        x, speed = uniform(rng, 28, 32), uniform(rng, 1.0, 2.6)
        things.append(_mover(rng, scene, x, choose(rng, (speed, -speed, 0.0))))
    return _coloured(rng, _panels(rng, replace(scene, things=tuple(things)), 0.75))


def collide(rng: Generator) -> Scene:
    """Two or three things on the floor; one runs into the next."""
    scene = _walled(rng, stage(rng))
    first = _mover(rng, scene, uniform(rng, 11, 13), uniform(rng, 1.6, 3.0))
    second = thing(rng, friction=(0.0, 0.5))
    x, speed = uniform(rng, 29, 34), uniform(rng, 0.5, 2.0)
    things = [first, replace(standing(second, scene, x), velocity=(-speed * chance(rng, 0.5), 0))]
    if chance(rng, 0.3):
        things.append(standing(thing(rng), scene, x + uniform(rng, 15, 17)))
    return _coloured(rng, _panels(rng, replace(scene, things=tuple(things)), 0.3))


def ramp(rng: Generator) -> Scene:
    """A thing goes down a ramp and along the floor; something may stand there."""
    scene = stage(rng)
    width, height = uniform(rng, 22, 32), uniform(rng, 14, 26)
    foot = scene.floor
    corners = ((0.0, foot - height), (width, foot), (0.0, foot))
    scene = replace(scene, blocks=(Block("ramp", corners),))
    slope = np.arctan2(height, width)
    body = thing(rng, friction=(0.0, 0.15)) if chance(rng, 0.4) else thing(rng, ("ball",))
    angle = body.angle + (0 if body.shape == "ball" else slope)
    along = uniform(rng, 0.22, 0.35) * width
    away = depth(body) + 0.1
    x = along + away * np.sin(slope)
    y = foot - height + along * height / width - away * np.cos(slope)
    things = [replace(thrown(body, float(x), float(y)), angle=float(angle))]
    if chance(rng, 0.5):
        x = uniform(rng, width + 12, SIZE - 8)
        things.append(standing(thing(rng, friction=(0.0, 0.5)), scene, x))
    return _coloured(rng, _panels(rng, replace(scene, things=tuple(things)), 0.4, first=width + 3))


def toss(rng: Generator) -> Scene:
    """One or two things are thrown across the picture, or up."""
    scene = _walled(rng, stage(rng))
    things = []
    for x in (uniform(rng, 12, 17), uniform(rng, 46, 52))[: int(rng.integers(1, 3))]:
        body = replace(
            thing(rng), angle=uniform(rng, -np.pi, np.pi), spin=uniform(rng, -0.15, 0.15)
        )
        right = uniform(rng, -0.3, 1.6) * (1 if x < SIZE / 2 else -1)
        up = uniform(rng, 2.0, 5.0)
        things.append(thrown(body, x, scene.floor - uniform(rng, 9, 18), right, -up))
    return _coloured(rng, _panels(rng, replace(scene, things=tuple(things)), 0.4))


def enter(rng: Generator) -> Scene:
    """Something comes in from the side or from above; something else may lie there."""
    scene = stage(rng)
    if chance(rng, 0.6):
        things = [_mover(rng, scene, uniform(rng, -16, -8), uniform(rng, 1.4, 2.8))]
    else:
        body = replace(thing(rng), spin=uniform(rng, -0.1, 0.1))
        things = [thrown(body, uniform(rng, 10, 26), uniform(rng, -20, -8), uniform(rng, 0, 1))]
    if chance(rng, 0.6):
        things.append(standing(thing(rng, friction=(0.0, 0.8)), scene, uniform(rng, 40, 54)))
    return _coloured(rng, _panels(rng, replace(scene, things=tuple(things)), 0.5))


FAMILIES: dict[str, Callable[[Generator], Scene]] = {
    function.__name__: function for function in (drop, roll, collide, ramp, toss, enter)
}


def _mover(rng: Generator, scene: Scene, x: float, speed: float) -> Thing:
    """A thing that rolls, glides, or is pushed and slowed by friction."""
    body = thing(rng)
    if chance(rng, 0.3):
        return moving(body, scene, x, speed, glide=True)
    if body.shape == "ball":
        return moving(body, scene, x, speed, glide=False)
    return replace(standing(body, scene, x), velocity=(speed, 0.0), friction=uniform(rng, 0, 0.3))


def _columns(rng: Generator, count: int) -> list[float]:
    """Places from left to right with room for a thing each."""
    slot = (SIZE - 10) / count
    slack = max(0.0, slot / 2 - 8.5)
    return [5 + slot * (n + 0.5) + uniform(rng, -slack, slack) for n in range(count)]


def _walled(rng: Generator, scene: Scene) -> Scene:
    return replace(scene, blocks=side_walls()) if chance(rng, 0.5) else scene


def _panels(rng: Generator, scene: Scene, share: float, first: float = 8.0) -> Scene:
    """With probability `share`, one or two panels right of `first`, which stand or rise and
    fall.
    """
    if not chance(rng, share):
        return scene
    count = 2 if first < 16 and chance(rng, 0.35) else 1
    room = (SIZE - 6 - first) / count
    rise, fall = (None, None) if chance(rng, 0.4) else (uniform(rng, 0, 6), uniform(rng, 18, 26))
    panels = []
    for n in range(count):
        width = min(uniform(rng, 13, 24), room - 2)
        left = first + n * room + uniform(rng, 0, room - width)
        panels.append(Panel(left, left + width, uniform(rng, 14, 26), rise, fall))
    return replace(scene, panels=tuple(panels))


def _coloured(rng: Generator, scene: Scene) -> Scene:
    """Give the things of one scene different colours."""
    colours = rng.permutation(list(COLOURS)).tolist()
    things = (replace(one, colour=c) for one, c in zip(scene.things, colours, strict=False))
    return replace(scene, things=tuple(things))
