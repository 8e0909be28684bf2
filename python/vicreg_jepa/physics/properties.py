"""Pairs of possible scenes whose continuations, when exchanged, break one property of the world.

Every property is broken only by an exchange: every frame comes from a simulation of possible
physics. `identity`, `motion` and this file choose the difference between the two scenes and the
frames at which they may be cut; `quadruplets` cuts. Pairs go from left to right; `quadruplets`
mirrors half of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vicreg_jepa.physics.identity import colour, continuity, permanence, shape, size
from vicreg_jepa.physics.motion import gravity, inertia, solidity
from vicreg_jepa.physics.pair import SMALL, Pair, with_things
from vicreg_jepa.physics.scene import COLOURS, SIZE, Panel
from vicreg_jepa.physics.stage import Generator, moving, stage, thing, uniform


def control(rng: Generator, hidden: bool) -> Pair:
    """One thing leaves the picture and later another one comes in: all combinations are possible.

    Hidden: the second thing comes out from behind a panel that stood there from the start.
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
        size,
    )
}
# Training videos stage these. The scenes of `size` are those of `shape` and `colour` for things of
# other sizes, which the other families show; so the videos of a seed are the same without it.
STAGED = tuple(name for name in PROPERTIES if name != "size")
