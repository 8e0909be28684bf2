"""Renders a clip as pictures, antialiased by the signed distance of each pixel to the outline.

Each thing is drawn on the small patch around it in all frames at once, so a video takes a few
milliseconds in numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.physics.scene import COLOURS, FRAMES, SIZE, Backdrop, Clip, Panel, Scene, Thing

Floats = NDArray[np.float32]

SOLID = np.array((92, 72, 58), dtype=np.float32)
PANEL = np.array((150, 150, 155), dtype=np.float32)
PANEL_EDGE = np.array((95, 95, 100), dtype=np.float32)


def frames(clip: Clip) -> NDArray[np.uint8]:
    """uint8 [T, 64, 64, 3]"""
    video = np.repeat(_still(clip.scene)[None], FRAMES, axis=0)
    for number, thing in enumerate(clip.scene.things):
        _thing(video, thing, clip.position[:, number], clip.angle[:, number])
    for panel in clip.scene.panels:
        _panel(video, panel, clip.scene.floor)
    return np.rint(video).astype(np.uint8)


def _still(scene: Scene) -> Floats:
    """[64, 64, 3]: everything that does not move and is not in front."""
    picture = _backdrop(scene.backdrop)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) + np.float32(0.5)
    ground = _cover(scene.floor - y)[..., None]
    picture += ground * (np.array(scene.backdrop.floor, dtype=np.float32) - picture)
    for block in scene.blocks:
        corners = np.array(block.corners)
        centre = corners.mean(0)
        inside = _cover(_polygon(x - centre[0], y - centre[1], corners - centre))[..., None]
        picture += inside * (SOLID - picture)
    return picture


def _backdrop(backdrop: Backdrop) -> Floats:
    picture = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    picture[:] = backdrop.tint
    if backdrop.texture is not None:
        texture = np.array(backdrop.texture, dtype=np.float32)
        places = np.linspace(0, len(texture) - 1, SIZE)
        knots = np.arange(len(texture))
        blur = np.stack([np.interp(places, knots, row) for row in np.eye(len(texture))], axis=1)
        picture += (blur @ texture @ blur.T)[..., None].astype(np.float32)
    return picture.clip(0, 255)


def _thing(video: Floats, thing: Thing, position: NDArray, angle: NDArray) -> None:
    """Draw the thing on video [T, 64, 64, 3]; position: [T, 2], angle: [T]."""
    outline = thing.outline()
    reach = thing.radius if outline is None else np.linalg.norm(outline[0])
    side = 2 * int(np.ceil(reach)) + 3
    start = np.clip(np.floor(position - side / 2 + 0.5).astype(int), 0, SIZE - side)  # [T, 2]
    columns, rows = (start[:, axis, None] + np.arange(side) for axis in (0, 1))  # [T, side]
    x = (columns + 0.5 - position[:, :1]).astype(np.float32)[:, None, :]
    y = (rows + 0.5 - position[:, 1:]).astype(np.float32)[:, :, None]
    cos, sin = (f(angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    u, v = cos * x + sin * y, cos * y - sin * x  # [T, side, side], in the thing's own frame
    distance = np.hypot(u, v) - thing.radius if outline is None else _polygon(u, v, outline)
    colour = np.array(COLOURS[thing.colour], dtype=np.float32)
    paint = 0.55 * colour + _cover(distance + 1)[..., None] * (0.45 * colour)  # a dark rim
    if outline is None:
        # A ball's light spot shows how it turns.
        spot = _cover(np.hypot(u - 0.42 * thing.radius, v) - 0.3 * thing.radius)[..., None]
        paint += 0.75 * spot * (255 - paint)
    where = (np.arange(FRAMES)[:, None, None], rows[:, :, None], columns[:, None, :])
    patch = video[where]
    video[where] = patch + _cover(distance)[..., None] * (paint - patch)


def _panel(video: Floats, panel: Panel, floor: float) -> None:
    heights = panel.heights().astype(np.float32)[:, None]
    # The panel is a little nearer than the things; otherwise their lower edges would show below it.
    foot = np.where(heights > 0, np.ceil(floor) + 1, floor).astype(np.float32)
    columns = slice(max(int(panel.left), 0), int(np.ceil(panel.right)))
    edges = np.arange(SIZE, dtype=np.float32)
    patch = video[:, :, columns]

    def cover(inset: float) -> Floats:
        """[T, 64, columns, 1]: the share of each pixel that lies in the panel without a rim of
        `inset`.
        """
        across = _overlap(edges[columns], panel.left + inset, panel.right - inset)
        down = _overlap(edges, floor - heights + inset, foot - inset)
        return (down[:, :, None] * across)[..., None]

    patch += cover(0.0) * (PANEL_EDGE - patch)
    patch += cover(1.0) * (PANEL - patch)


def _overlap(edges: Floats, low: Floats | float, high: Floats | float) -> Floats:
    """The length of [edge, edge + 1] inside [low, high]."""
    return np.clip(np.minimum(edges + 1, high) - np.maximum(edges, low), 0, 1).astype(np.float32)


def _polygon(x: NDArray, y: NDArray, corners: NDArray) -> NDArray:
    """Signed distance to a convex polygon around the origin; too small off its corners."""
    following = np.roll(corners, -1, axis=0)
    normals = np.stack([following[:, 1] - corners[:, 1], corners[:, 0] - following[:, 0]], axis=1)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    offsets = (normals * corners).sum(1)
    normals *= np.sign(offsets)[:, None]
    distance = None
    for (a, b), offset in zip(normals.astype(np.float32), np.abs(offsets), strict=True):
        edge = a * x + b * y - np.float32(offset)
        distance = edge if distance is None else np.maximum(distance, edge)
    assert distance is not None
    return distance


def _cover(distance: NDArray) -> Floats:
    """The share of a pixel that is inside, by the signed distance of its centre."""
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)
