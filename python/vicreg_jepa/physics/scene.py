"""The contents of a video and their simulation: rigid bodies in a plane, stepped by pymunk.

Lengths are pixels of the picture (64 x 64, x to the right, y down), times are frames, angles are
radians, positive clockwise as seen. A body's density is 1, so its mass is its area in pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import pymunk
except ImportError as error:
    raise ImportError("physics videos need pymunk: pip install pymunk") from error

SIZE = 64
FRAMES = 32
# The fastest body moves about 6 pixels a frame, so 0.4 a step; the thinnest wall has 3.
SUBSTEPS = 16
PANEL_MOVE = 4  # frames that a panel takes to rise or to fall

SHAPES = ("ball", "box", "triangle")
COLOURS = {
    "red": (214, 40, 40),
    "green": (30, 150, 60),
    "blue": (35, 80, 215),
    "yellow": (250, 200, 20),
    "magenta": (205, 50, 190),
    "cyan": (20, 185, 205),
}


@dataclass(frozen=True)
class Thing:
    """A body that moves. radius: of the ball; a box or triangle has about the same area.

    position, velocity, angle, spin: at frame 0. restitution, friction: in contact with fixed
    blocks; in contact with another thing the product of both values counts.
    """

    shape: str
    colour: str
    radius: float
    position: tuple[float, float] = (0.0, 0.0)
    velocity: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0
    spin: float = 0.0
    restitution: float = 0.5
    friction: float = 0.5

    def outline(self) -> NDArray[np.float64] | None:
        """[K, 2]: corners about the centre of mass at angle 0; None for a ball."""
        if self.shape == "ball":
            return None
        corners, first, size = (4, 0.5, 0.9 * 2**0.5) if self.shape == "box" else (3, 0.25, 1.4)
        reach = size * self.radius
        turns = (np.arange(corners) + first) / corners  # level edges below
        around = 2 * np.pi * turns
        return reach * np.stack([np.cos(around), np.sin(around)], axis=1)

    def reach(self, angle: NDArray[np.float64]) -> NDArray[np.float64]:
        """angle: [T] -> [T, 4]: its extent to the left, right, top and bottom of its centre."""
        outline = self.outline()
        if outline is None:
            return np.full((len(angle), 4), self.radius)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        x = cos * outline[:, 0] - sin * outline[:, 1]  # [T, K]
        y = sin * outline[:, 0] + cos * outline[:, 1]
        return np.stack([-x.min(1), x.max(1), -y.min(1), y.max(1)], axis=1)


@dataclass(frozen=True)
class Block:
    """A fixed solid convex polygon. kind: wall, shelf, pillar or ramp."""

    kind: str
    corners: tuple[tuple[float, float], ...]


def upright(kind: str, left: float, right: float, top: float, bottom: float) -> Block:
    """A rectangle with level edges."""
    return Block(kind, ((left, top), (right, top), (right, bottom), (left, bottom)))


@dataclass(frozen=True)
class Panel:
    """A grey sheet in front of everything, on the floor. It hides things and touches nothing.

    rise, fall: the frames at which it starts to rise and to fall; rise=None: it stands from the
    start; fall=None: it never falls.
    """

    left: float
    right: float
    height: float
    rise: float | None = None
    fall: float | None = None

    def heights(self) -> NDArray[np.float64]:
        """[T]"""
        frame = np.arange(FRAMES)
        share = np.ones(FRAMES)
        if self.rise is not None:
            share = np.clip((frame - self.rise) / PANEL_MOVE, 0, 1)
        if self.fall is not None:
            share = np.minimum(share, np.clip(1 - (frame - self.fall) / PANEL_MOVE, 0, 1))
        return self.height * share


@dataclass(frozen=True)
class Backdrop:
    """tint, floor: RGB; texture: 6 x 6 values that are blurred over the picture and added to it."""

    tint: tuple[float, ...]
    floor: tuple[float, ...]
    texture: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class Scene:
    gravity: float
    floor: float
    backdrop: Backdrop
    things: tuple[Thing, ...] = ()
    blocks: tuple[Block, ...] = ()
    panels: tuple[Panel, ...] = ()

    def mirrored(self) -> Scene:
        """Left and right exchanged; the backdrop stays."""
        things = (
            replace(
                thing,
                position=(SIZE - thing.position[0], thing.position[1]),
                velocity=(-thing.velocity[0], thing.velocity[1]),
                angle=-thing.angle,
                spin=-thing.spin,
            )
            for thing in self.things
        )
        blocks = (
            Block(block.kind, tuple((SIZE - x, y) for x, y in reversed(block.corners)))
            for block in self.blocks
        )
        panels = (
            replace(panel, left=SIZE - panel.right, right=SIZE - panel.left)
            for panel in self.panels
        )
        return replace(self, things=tuple(things), blocks=tuple(blocks), panels=tuple(panels))


@dataclass(frozen=True)
class Clip:
    """A scene and its simulated motion.

    position, velocity: [T, N, 2]; angle, spin: [T, N];
    contacts: (frame, thing, the object it touched: "floor", a block's kind or another thing) at the
    start of each contact.
    """

    scene: Scene
    position: NDArray[np.float64]
    velocity: NDArray[np.float64]
    angle: NDArray[np.float64]
    spin: NDArray[np.float64]
    contacts: tuple[tuple[int, int, str | int], ...]

    @cached_property
    def bounds(self) -> NDArray[np.float64]:
        """[T, N, 4]: left, right, top, bottom of each thing."""
        reach = np.empty((*self.angle.shape, 4))
        for number, thing in enumerate(self.scene.things):
            reach[:, number] = thing.reach(self.angle[:, number])
        return np.repeat(self.position, 2, axis=2) + reach * np.array([-1, 1, -1, 1])

    def hidden(self) -> NDArray[np.bool_]:
        """[T, N]: wholly behind one panel."""
        left, right, top, bottom = np.moveaxis(self.bounds, 2, 0)
        hidden = np.zeros(left.shape, dtype=bool)
        for panel in self.scene.panels:
            sides = (left >= panel.left) & (right <= panel.right) & (bottom <= self.scene.floor + 1)
            hidden |= sides & (top >= self.scene.floor - panel.heights()[:, None])
        return hidden

    def covered(self) -> NDArray[np.bool_]:
        """[T, N]: at least partly behind a panel."""
        left, right, _, bottom = np.moveaxis(self.bounds, 2, 0)
        touched = np.zeros(left.shape, dtype=bool)
        for panel in self.scene.panels:
            height = panel.heights()[:, None]
            sides = (right > panel.left - 1) & (left < panel.right + 1) & (height > 0)
            touched |= sides & (bottom > self.scene.floor - height - 1)
        return touched

    def inside(self) -> NDArray[np.bool_]:
        """[T, N]: wholly in the picture."""
        return np.all((self.bounds >= 0) & (self.bounds <= SIZE), axis=2)

    def record(self) -> dict[str, Any]:
        """A description for JSON; states are rounded to a thousandth of a pixel."""
        scene = asdict(self.scene)
        del scene["backdrop"]
        names = ("position", "velocity", "angle", "spin")
        states = {name: np.round(getattr(self, name), 3).tolist() for name in names}
        hidden = [np.flatnonzero(column).tolist() for column in self.hidden().T]
        return {**scene, **states, "contacts": list(self.contacts), "hidden": hidden}


def simulate(scene: Scene) -> Clip:
    """Step the scene through all frames. The same scene gives the same clip, bit for bit."""
    space = pymunk.Space()
    space.gravity = (0.0, scene.gravity)
    space.iterations = 20
    space.collision_slop = 0.05
    far = 10 * SIZE
    floor = upright("floor", -far, far, scene.floor, scene.floor + SIZE)
    names: dict[pymunk.Shape, str | int] = {}
    for block in (floor, *scene.blocks):
        fixed = pymunk.Poly(space.static_body, block.corners)
        fixed.elasticity = fixed.friction = 1.0
        space.add(fixed)
        names[fixed] = block.kind
    bodies = []
    for number, thing in enumerate(scene.things):
        outline = thing.outline()
        body = pymunk.Body()
        shape: pymunk.Shape = (
            pymunk.Circle(body, thing.radius)
            if outline is None
            else pymunk.Poly(body, [tuple(corner) for corner in outline.tolist()])
        )
        shape.density = 1.0
        shape.elasticity, shape.friction = thing.restitution, thing.friction
        space.add(body, shape)
        body.position, body.velocity = thing.position, thing.velocity
        body.angle, body.angular_velocity = thing.angle, thing.spin
        bodies.append(body)
        names[shape] = number

    frame = 0
    contacts: list[tuple[int, int, str | int]] = []

    def met(arbiter: pymunk.Arbiter, _space: pymunk.Space, _data: Any) -> bool:
        first, second = (names[shape] for shape in arbiter.shapes)
        if isinstance(second, int):
            contacts.append((frame, second, first))
        if isinstance(first, int):
            contacts.append((frame, first, second))
        return True  # pymunk 6: the contact counts

    either: Any = space  # its types are those of one version
    if hasattr(space, "on_collision"):
        either.on_collision(begin=met)
    else:  # pymunk 6, which gym-pusht needs
        either.add_default_collision_handler().begin = met
    states = np.empty((FRAMES, len(bodies), 6))
    for frame in range(FRAMES):
        for _ in range(SUBSTEPS if frame else 0):
            space.step(1 / SUBSTEPS)
        for number, body in enumerate(bodies):
            states[frame, number] = (
                *body.position,
                *body.velocity,
                body.angle,
                body.angular_velocity,
            )
    return Clip(
        scene,
        position=states[:, :, 0:2],
        velocity=states[:, :, 2:4],
        angle=states[:, :, 4],
        spin=states[:, :, 5],
        contacts=tuple(contacts),
    )
