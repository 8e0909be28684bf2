"""Random parts of a scene, shared by the possible videos and by the matched pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from vicreg_jepa.physics.scene import COLOURS, SHAPES, SIZE, Backdrop, Block, Scene, Thing, upright

Generator = np.random.Generator
T = TypeVar("T")


def uniform(rng: Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def choose(rng: Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def chance(rng: Generator, share: float) -> bool:
    return bool(rng.random() < share)


def stage(rng: Generator) -> Scene:
    """An empty scene: its backdrop, floor and gravity (pixels a frame squared)."""
    tint = tuple(float(value) for value in rng.uniform(205, 250, 3))
    ground = tuple(float(value) for value in rng.uniform(150, 185) * np.array((1.0, 0.9, 0.75)))
    texture = None
    if chance(rng, 0.5):
        texture = tuple(map(tuple, rng.uniform(-14, 14, (6, 6)).tolist()))
    backdrop = Backdrop(tint, ground, texture)
    return Scene(gravity=uniform(rng, 0.25, 0.42), floor=uniform(rng, 53, 58), backdrop=backdrop)


def thing(
    rng: Generator,
    shapes: Sequence[str] = SHAPES,
    radius: tuple[float, float] = (4.2, 5.8),
    colours: Sequence[str] = tuple(COLOURS),
    friction: tuple[float, float] = (0.3, 0.8),
    restitution: tuple[float, float] = (0.3, 0.75),
) -> Thing:
    """A thing without a place yet. A ball's spot starts at any angle; the other shapes stand
    level.
    """
    shape = choose(rng, shapes)
    return Thing(
        shape,
        choose(rng, colours),
        uniform(rng, *radius),
        angle=uniform(rng, -np.pi, np.pi) if shape == "ball" else 0.0,
        restitution=uniform(rng, *restitution),
        friction=uniform(rng, *friction),
    )


def colours_but(*taken: str) -> list[str]:
    return [colour for colour in COLOURS if colour not in taken]


def other_shape(rng: Generator, taken: str) -> str:
    return choose(rng, [shape for shape in SHAPES if shape != taken])


def depth(body: Thing) -> float:
    """How far a thing extends below its centre at its first angle."""
    return float(body.reach(np.array([body.angle]))[0, 3])


def half_width(body: Thing) -> float:
    return float(body.reach(np.array([body.angle]))[0, :2].max())


def standing(body: Thing, scene: Scene, x: float) -> Thing:
    """Put a thing at rest on the floor."""
    return replace(body, position=(x, scene.floor - depth(body)), velocity=(0.0, 0.0), spin=0.0)


def moving(body: Thing, scene: Scene, x: float, speed: float, glide: bool) -> Thing:
    """Let a thing move along the floor at a constant speed: a rolling ball, or anything without
    friction.
    """
    sliding = replace(standing(body, scene, x), velocity=(speed, 0.0))
    if glide:
        return replace(sliding, friction=0.0)
    if body.shape != "ball":
        raise ValueError(f"shape: got {body.shape!r}, takes 'ball' (the others do not roll)")
    return replace(sliding, spin=speed / body.radius)


def thrown(body: Thing, x: float, y: float, right: float = 0.0, down: float = 0.0) -> Thing:
    return replace(body, position=(x, y), velocity=(right, down))


def wall(rng: Generator, scene: Scene, x: float, height: float) -> Block:
    half = uniform(rng, 1.5, 2.2)
    return upright("wall", x - half, x + half, scene.floor - height, scene.floor + 0.5)


def side_walls() -> tuple[Block, Block]:
    """Walls at both edges of the picture."""
    return tuple(  # type: ignore[return-value]
        upright("wall", left, left + 3, -SIZE, 2 * SIZE) for left in (0.0, SIZE - 3.0)
    )
