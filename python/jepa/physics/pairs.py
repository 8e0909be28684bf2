"""Two possible scenes whose continuations, when exchanged, break one property of the world.

Every property is broken by exchange alone: no frame is drawn that possible physics did not give.
What differs between the two scenes, and where they may be cut, is chosen here; `quadruplets` cuts.
A pair is left to right; `quadruplets` mirrors half of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from jepa.physics.place import (
    Generator,
    chance,
    choose,
    depth,
    half_width,
    moving,
    other_colour,
    other_shape,
    stage,
    standing,
    thing,
    thrown,
    uniform,
    wall,
)
from jepa.physics.scene import COLOURS, FRAMES, SIZE, Panel, Scene, Thing, upright

SMALL = (3.8, 4.8)


@dataclass(frozen=True)
class Pair:
    """cut: first and last frame at which the continuations may be exchanged.

    unseen: the cut lies where both pictures are the same, so that it does not show itself.
    apart: least and greatest distance, at the cut, of the last thing of both scenes.
    """

    first: Scene
    second: Scene
    unseen: bool
    cut: tuple[int, int]
    apart: tuple[float, float] = (0.0, float("inf"))


def with_things(scene: Scene, *things: Thing) -> Scene:
    return replace(scene, things=(*scene.things, *things))


def _behaviour(
    rng: Generator, scene: Scene, hidden: bool, body: Thing
) -> tuple[Scene, Callable[[Thing], Thing]]:
    """A scene for one thing of about body's size, and what that thing does there.

    It stands, moves along or drops; when hidden, a panel rises before it, and falls again at the
    end, so that what is not seen any more is seen to be gone.
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
            other = thing(rng, radius=SMALL, colours=_others(body.colour))
            scene = with_things(scene, standing(other, scene, middle + side))
    if hidden:
        height = uniform(rng, 18, 24) if kind == "drop" else width + uniform(rng, 5, 10)
        half = width / 2 + uniform(rng, 3.5, 5.5)
        scene = replace(scene, panels=(Panel(middle - half, middle + half, height, rise, fall),))
    return scene, place


def _others(*taken: str) -> list[str]:
    return [colour for colour in COLOURS if colour not in taken]


def permanence(rng: Generator, hidden: bool) -> Pair:
    """A thing is there, or is not: it vanishes, or appears."""
    body = thing(rng, radius=SMALL if hidden else (4.2, 5.8), restitution=(0.15, 0.5))
    scene, place = _behaviour(rng, stage(rng), hidden, body)
    return Pair(with_things(scene, place(body)), scene, hidden, (8, 22))


def shape(rng: Generator, hidden: bool) -> Pair:
    """Two things alike but for their shape, which do the same: a ball turns into a box."""
    body = thing(rng, radius=(4.5, 5.0) if hidden else (5.0, 5.8), restitution=(0.15, 0.5))
    body = replace(body, angle=0.0)
    changed = replace(body, shape=other_shape(rng, body.shape))
    scene, place = _behaviour(rng, stage(rng), hidden, max(body, changed, key=half_width))
    # Behind a panel they need not be at quite the same place.
    apart = (0.0, float("inf")) if hidden else (0.0, 3.0)
    first, second = (with_things(scene, place(one)) for one in (body, changed))
    return Pair(first, second, hidden, (8, 22), apart)


def colour(rng: Generator, hidden: bool) -> Pair:
    """Two things alike but for their colour, which do the same."""
    body = thing(rng, radius=SMALL if hidden else (4.2, 5.8), restitution=(0.15, 0.5))
    scene, place = _behaviour(rng, stage(rng), hidden, body)
    taken = {body.colour, *(one.colour for one in scene.things)}
    changed = replace(body, colour=other_colour(rng, *taken))
    first, second = (with_things(scene, place(one)) for one in (body, changed))
    return Pair(first, second, hidden, (8, 22), (0.0, 1e-9))


def continuity(rng: Generator, hidden: bool) -> Pair:
    """The same thing at two places: it is suddenly at the other one.

    Hidden: behind two panels, and never seen in the gap between them.
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


def solidity(rng: Generator, hidden: bool) -> Pair:
    """One bounces off this side of a wall or shelf, one off the other side, at the same time.

    Hidden: a panel before the wall's lower part hides both when they touch it.
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
    speed = uniform(rng, 1.5, 1.8) if hidden else uniform(rng, 2.0, 2.6)
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
    """Solidity, seen from above: one falls on a shelf, one is thrown against it from below."""
    middle, above = uniform(rng, 22, 42), uniform(rng, 22, 25)
    reach = uniform(rng, 13, 18)
    below = above + uniform(rng, 3, 4)
    contact = uniform(rng, 5.6, 6.9)
    fallen = scene.gravity * contact**2 / 2
    down = uniform(rng, 0.3, 0.9)
    first = thrown(body, middle, above - depth(body) - fallen - down * contact, down=down)
    top = below + depth(body)
    up = scene.gravity * contact + uniform(rng, 1.3, 1.8)
    second = thrown(body, middle, top + up * contact - fallen, down=-up)
    shelf = upright("shelf", middle - reach, middle + reach, above, below)
    scene = replace(scene, blocks=(shelf,))
    cut = int(contact) + 1
    return Pair(with_things(scene, first), with_things(scene, second), False, (cut, cut))


def gravity(rng: Generator, hidden: bool) -> Pair:
    """Seen: one falls, one flies up through the same place: each turns round in the air.

    Hidden: a thing falls on a pillar or, where there is none, to the floor; a panel hides whether
    there is one. It hangs in the air, or falls through what held it.
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
    body = thing(rng, radius=(4.2, 5.4))
    cut = int(rng.integers(5, 8))
    below = scene.floor - depth(body) - uniform(rng, 0.1, 2)
    rise = below - body.radius * 1.4 - uniform(rng, 1, 8)  # up to its highest place
    up, down = (2 * scene.gravity * rise) ** 0.5, uniform(rng, 0.0, 1.0)
    column = uniform(rng, 20, 44)
    drift = choose(rng, (0.0, uniform(rng, -0.4, 0.4)))
    first = thrown(body, column, below - (up + down) * cut, drift, down)
    second = thrown(body, column, below, drift, -up)
    first_scene, second_scene = (with_things(scene, one) for one in (first, second))
    return Pair(first_scene, second_scene, False, (cut, cut), (0.0, 0.5))


def inertia(rng: Generator, hidden: bool) -> Pair:
    """Balls that roll through one place at one time, the one to the right, the other to the left
    (each turns round by itself) or at rest there (it stops dead, or starts off by itself)."""
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


def control(rng: Generator, hidden: bool) -> Pair:
    """One thing leaves the picture, later another one comes in: any may follow any.

    Hidden: the other one comes out from behind a panel that stood there from the start.
    """
    scene = stage(rng)
    colours = list(COLOURS)
    rng.shuffle(colours)
    speed, cut = uniform(rng, 1.9, 2.4), 10
    leaving = thing(rng, radius=SMALL)
    gone = -leaving.radius * 1.5 - 1 + speed * (cut - 2)
    leaving = moving(leaving, scene, gone, -speed, glide=leaving.shape != "ball")
    entering = thing(rng, radius=SMALL)
    if hidden:
        pace = uniform(rng, 0.9, 1.1)
        middle = uniform(rng, 46, 49)
        half = 1.3 * entering.radius + 7.5
        panel = Panel(middle - half, middle + half, 2 * entering.radius + uniform(rng, 6, 10))
        scene = replace(scene, panels=(panel,))
        start = middle + half - 1.3 * entering.radius - 1.0
    else:
        pace = uniform(rng, 2.0, 2.4)
        start = SIZE + 1.5 * entering.radius + pace * (cut + 1)
    entering = moving(entering, scene, start, -pace, glide=entering.shape != "ball")
    first, second = (
        with_things(scene, replace(leaving, colour=a), replace(entering, colour=b))
        for a, b in (colours[:2], colours[2:4])
    )
    return Pair(first, second, True, (6, 20))


PROPERTIES: dict[str, Callable[[Generator, bool], Pair]] = {
    function.__name__: function
    for function in (
        permanence,
        continuity,
        solidity,
        gravity,
        shape,
        colour,
        inertia,
        control,
    )
}
