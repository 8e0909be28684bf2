"""Pairs that differ in the motion of a thing: its obstacle, its support, or its direction."""

from __future__ import annotations

from dataclasses import replace

from vicreg_jepa.physics.pair import NEVER, SMALL, Pair, with_things
from vicreg_jepa.physics.scene import SUBSTEPS, Panel, Scene, Thing, simulate, upright
from vicreg_jepa.physics.stage import (
    Generator,
    chance,
    choose,
    depth,
    half_width,
    moving,
    stage,
    standing,
    thing,
    thrown,
    uniform,
    wall,
)


def solidity(rng: Generator, hidden: bool) -> Pair:
    """The two things bounce off opposite sides of a wall or shelf at the same time.

    Hidden: a panel in front of the lower part of the wall hides both when they touch it.
    """
    scene = stage(rng)
    # No triangles: they would tip over at the wall.
    body = thing(rng, ("ball", "box"), SMALL, friction=(0.0, 0.0), restitution=(0.8, 0.95))
    half = half_width(body)
    if not hidden and chance(rng, 0.5):
        return _shelf(rng, scene, body)
    middle = uniform(rng, 30, 34)
    barrier = wall(rng, scene, middle, height=uniform(rng, 28, 36))
    left, right = barrier.corners[0][0], barrier.corners[1][0]
    speed = uniform(rng, 1.5, 1.8) if hidden else uniform(rng, 1.6, 2.1)
    start = uniform(rng, 6.5, 8.0)
    contact = (left - half - start) / speed
    first = moving(body, scene, start, speed, glide=True)
    second = moving(body, scene, right + half + contact * speed, -speed, glide=True)
    scene = replace(scene, blocks=(barrier,))
    cut = int(contact) + 1
    if hidden:
        reach = 2 * half + uniform(rng, 3.5, 5.0)
        height = 2 * half + uniform(rng, 4, 8)
        panel = Panel(left - reach, right + reach, height, 0.0, uniform(rng, 24, 26))
        scene = replace(scene, panels=(panel,))
    window = (5, 22) if hidden else (cut, cut)
    return Pair(with_things(scene, first), with_things(scene, second), hidden, window)


def _shelf(rng: Generator, scene: Scene, body: Thing) -> Pair:
    """Solidity in the vertical: one thing falls on a shelf, the other bounces off the floor against
    it from below.
    """
    middle, above = uniform(rng, 22, 42), uniform(rng, 22, 25)
    reach, below = uniform(rng, 13, 18), above + uniform(rng, 3, 4)
    shelf = upright("shelf", middle - reach, middle + reach, above, below)
    scene = replace(scene, blocks=(shelf,))
    top = below + depth(body) + uniform(rng, 1, 3)
    # v^2 lost on the way up to the shelf, and v^2 left there
    climb = 2 * scene.gravity * (scene.floor - below - 2 * depth(body))
    excess = uniform(rng, 1.2, 1.8) ** 2
    start = 2 * scene.gravity * (scene.floor - depth(body) - top)
    down = ((excess + climb) / body.restitution**2 - start) ** 0.5
    second = with_things(scene, thrown(body, middle, top, down=down))
    cut = next((frame for frame, _, what in simulate(second).contacts if what == "shelf"), None)
    if cut is None:
        return Pair(second, second, False, NEVER)
    rest = above - depth(body)
    first = with_things(scene, _falling(rng, scene, body, middle, rest, cut - 0.5, rest))
    return Pair(first, second, False, (cut, cut))


def _falling(
    rng: Generator, scene: Scene, body: Thing, x: float, y: float, time: float, lowest: float
) -> Thing:
    """Throw it so that it falls through (x, y) at `time`, and is not below `lowest` before."""
    least = scene.gravity * time / 2 - (lowest - y) / time
    room = max(0.0, y - 1.4 * body.radius - 1)  # below the top of the picture
    most = (2 * scene.gravity * room) ** 0.5
    speed = least + max(0.0, most - least) * uniform(rng, 0.3, 0.9)
    down = speed - scene.gravity * time
    fallen = scene.gravity * time * (time - 1 / SUBSTEPS) / 2
    return thrown(body, x, y - down * time - fallen, down=down)


def gravity(rng: Generator, hidden: bool) -> Pair:
    """In view: one thing falls and one flies up from its bounce through the same place at the same
    time; after the exchange each turns round in the air.

    Hidden: a thing falls on a pillar or, without a pillar, to the floor; a panel hides the
    difference. After the exchange it hangs in the air, or falls through the pillar.
    """
    scene = stage(rng)
    if hidden:
        body = thing(rng, radius=SMALL, restitution=(0.0, 0.2))
        middle, top = uniform(rng, 20, 44), scene.floor - uniform(rng, 15, 18)
        half = half_width(body)
        pillar = upright("pillar", middle - half, middle + half, top, scene.floor + 0.5)
        reach = half + uniform(rng, 3, 5)
        panel = Panel(middle - reach, middle + reach, scene.floor - top + 1, uniform(rng, 3, 4))
        scene = with_things(
            replace(scene, panels=(panel,)), thrown(body, middle, depth(body) + uniform(rng, 1, 3))
        )
        return Pair(replace(scene, blocks=(pillar,)), scene, True, (6, 22))
    body = thing(rng, radius=(4.2, 5.4), restitution=(0.8, 0.92), friction=(0.0, 0.0))
    column = uniform(rng, 16, 48)
    rising = thrown(body, column, uniform(rng, 8, 14), down=uniform(rng, 0.5, 1.5))
    second = with_things(scene, rising)
    clip = simulate(second)
    rest = scene.floor - depth(body)
    height, speed = rest - clip.position[:, 0, 1], -clip.velocity[:, 0, 1]
    cuts = [cut for cut in range(8, 24) if height[cut] > 9 and speed[cut] > 1.9]
    if not cuts:
        return Pair(second, second, False, NEVER)
    cut = choose(rng, cuts)
    y = float(clip.position[cut, 0, 1])
    first = with_things(scene, _falling(rng, scene, body, column, y, cut, rest))
    return Pair(first, second, False, (cut, cut), (0.0, 0.8))


def inertia(rng: Generator, hidden: bool) -> Pair:
    """Two balls are at one place at one time. One rolls to the right; the other rolls to the left
    (after the exchange each turns round by itself) or is at rest there (after the exchange one
    stops dead, and one starts off by itself).
    """
    scene = stage(rng)
    body = thing(rng, ("ball",), radius=(4.0, 4.8) if hidden else (4.2, 5.2))
    turn = chance(rng, 0.5)
    cut = int(rng.integers(14, 17))
    speed = uniform(rng, 1.3, 1.45)
    middle = uniform(rng, 31, 33)
    first = moving(body, scene, middle - cut * speed, speed, glide=False)
    if turn:
        second = moving(body, scene, middle + cut * speed, -speed, glide=False)
    else:
        second = standing(body, scene, middle)
    # Both spots are at the same angle where they meet.
    second = replace(second, angle=first.angle + cut * (first.spin - second.spin))
    if hidden:
        reach = body.radius + uniform(rng, 3.5, 5.5)
        height = 2 * body.radius + uniform(rng, 5, 10)
        panel = Panel(middle - reach, middle + reach, height, 0.5, uniform(rng, 23, 25))
        scene = replace(scene, panels=(panel,))
    first_scene, second_scene = (with_things(scene, one) for one in (first, second))
    return Pair(first_scene, second_scene, hidden, (cut, cut), (0.0, 0.5))
