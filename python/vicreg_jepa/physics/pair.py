"""Two possible scenes and the frames at which their continuations may be exchanged."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vicreg_jepa.physics.scene import Scene, Thing

SMALL = (3.8, 4.8)
NEVER = (1, 0)  # a cut of a pair that cannot be exchanged after all


@dataclass(frozen=True)
class Pair:
    """cut: first and last frame at which the continuations may be exchanged.

    unseen: both pictures are the same at the cut, so the exchange is invisible. apart: least and
    greatest distance, at the cut, of the last thing of both scenes.
    """

    first: Scene
    second: Scene
    unseen: bool
    cut: tuple[int, int]
    apart: tuple[float, float] = (0.0, float("inf"))


def with_things(scene: Scene, *things: Thing) -> Scene:
    return replace(scene, things=(*scene.things, *things))
