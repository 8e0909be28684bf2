"""Pairs that differ in a thing itself: its existence, its place, its shape, colour or size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vicreg_jepa.physics.pair import SMALL, Pair, with_things
from vicreg_jepa.physics.scene import FRAMES, SIZE, Panel, Scene, Thing
from vicreg_jepa.physics.stage import (
    Generator,
    chance,
    choose,
    colours_but,
    half_width,
    moving,
    other_shape,
    stage,
    standing,
    thing,
    thrown,
    uniform,
)


def _behaviour(
    rng: Generator, scene: Scene, hidden: bool, body: Thing
) -> tuple[Scene, Callable[[Thing], Thing]]:
    """A scene for one thing of about the size of `body`, and a function that gives the thing its
    motion.

    The thing stands, moves along or drops. When hidden, a panel rises in front of it and falls
    again at the end, to show whether the thing is still there.
    """
    kind = choose(rng, ("stand", "move", "drop"))
    width = 2 * half_width(body)
    rise, fall = uniform(rng, 1, 3), uniform(rng, 22, 25)
    if kind == "move":
        start = width / 2 + uniform(rng, 1, 2)
        speed = (SIZE - 1 - width / 2 - start) / (FRAMES - 1) * uniform(rng, 0.93, 1.0)
        middle = start + speed * uniform(rng, 13.5, 15.5)
        glide = body.shape != "ball" or chance(rng, 0.3)

        def place(one: Thing) -> Thing:
            return moving(one, scene, start, speed, glide or one.shape != "ball")

    else:
        middle = uniform(rng, 18, SIZE - 18)
        level = uniform(rng, 8, 16)

        def place(one: Thing) -> Thing:
            return standing(one, scene, middle) if kind == "stand" else thrown(one, middle, level)

        if chance(rng, 0.5):
            side = uniform(rng, 20, 24) * (1 if middle < SIZE / 2 else -1)
            other = thing(rng, radius=SMALL, colours=colours_but(body.colour))
            scene = with_things(scene, standing(other, scene, middle + side))
    if hidden:
        height = uniform(rng, 18, 24) if kind == "drop" else width + uniform(rng, 5, 10)
        half = width / 2 + uniform(rng, 3.5, 5.5)
        scene = replace(scene, panels=(Panel(middle - half, middle + half, height, rise, fall),))
    return scene, place


def permanence(rng: Generator, hidden: bool) -> Pair:
    """A thing is there in one scene and not in the other: it vanishes, or appears."""
    body = thing(rng, radius=SMALL if hidden else (4.2, 5.8), restitution=(0.15, 0.5))
    scene, place = _behaviour(rng, stage(rng), hidden, body)
    return Pair(with_things(scene, place(body)), scene, hidden, (8, 22))


def shape(rng: Generator, hidden: bool) -> Pair:
    """Two things that differ only in shape and move the same way: a ball turns into a box."""
    body = thing(rng, radius=(4.5, 5.0) if hidden else (5.0, 5.8), restitution=(0.15, 0.5))
    body = replace(body, angle=0.0)
    changed = replace(body, shape=other_shape(rng, body.shape))
    scene, place = _behaviour(rng, stage(rng), hidden, max(body, changed, key=half_width))
    # Behind a panel they need not be at exactly the same place.
    apart = (0.0, float("inf")) if hidden else (0.0, 3.0)
    first, second = (with_things(scene, place(one)) for one in (body, changed))
    return Pair(first, second, hidden, (8, 22), apart)


def colour(rng: Generator, hidden: bool) -> Pair:
    """Two things that differ only in colour and move the same way."""
    body = thing(rng, radius=SMALL if hidden else (4.2, 5.8), restitution=(0.15, 0.5))
    scene, place = _behaviour(rng, stage(rng), hidden, body)
    taken = {body.colour, *(one.colour for one in scene.things)}
    changed = replace(body, colour=choose(rng, colours_but(*taken)))
    first, second = (with_things(scene, place(one)) for one in (body, changed))
    return Pair(first, second, hidden, (8, 22), (0.0, 1e-9))


def size(rng: Generator, hidden: bool) -> Pair:
    """Two things that differ only in size and move the same way: a thing grows, or shrinks."""
    small = thing(rng, radius=(3.8, 4.2), restitution=(0.15, 0.5))
    large = replace(small, radius=uniform(rng, 5.4, 5.8))
    scene, place = _behaviour(rng, stage(rng), hidden, large)
    apart = (0.0, float("inf")) if hidden else (0.0, 3.0)
    first, second = (with_things(scene, place(one)) for one in (small, large))
    return Pair(first, second, hidden, (8, 22), apart)


def continuity(rng: Generator, hidden: bool) -> Pair:
    """The same thing at two places: it jumps from one to the other.

    Hidden: it jumps from behind one panel to behind another, and is never seen in the gap.
    """
    scene = stage(rng)
    body = thing(rng, radius=(3.8, 4.4) if hidden else (4.2, 5.8), restitution=(0.15, 0.5))
    places = uniform(rng, 14, 19), uniform(rng, 45, 50)
    half = half_width(body) + uniform(rng, 3.0, 4.5)
    glide = body.shape != "ball"
    kind = choose(rng, ("stand", "drop", "move"))
    if kind == "move":
        # At the cut, frame 11, the one is behind the left panel and the other behind the right one.
        speed = uniform(rng, 1.0, 1.2)
        places = uniform(rng, 18, 20), uniform(rng, 44, 46)
        first, second = (moving(body, scene, x - 11 * speed, speed, glide) for x in places)
        rise, fall = None, None
    elif kind == "stand":
        first, second = (standing(body, scene, x) for x in places)
        rise, fall = uniform(rng, 1, 3), uniform(rng, 20, 24)
    else:
        level = uniform(rng, 8, 16)
        first, second = (thrown(body, x, level) for x in places)
        rise, fall = None, uniform(rng, 22, 24)
    if hidden:
        height = 2 * half_width(body) + uniform(rng, 6, 11)
        panels = tuple(Panel(x - half, x + half, height, rise, fall) for x in places)
        scene = replace(scene, panels=panels)
    first_scene, second_scene = (with_things(scene, one) for one in (first, second))
    return Pair(first_scene, second_scene, hidden, (7, 22), (16.0, float("inf")))
