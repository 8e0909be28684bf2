"""What nobody can predict, laid over a video: texture, shake, leaves, rain, light and camera noise.

The disturbance of a frame is a function of the picture that depends on the seed, the strength and
the number of the frame alone. The four videos of a quadruplet get the same disturbance, so frames
that were equal stay equal, and at every frame the impossible two still show the pictures of the
possible two. Nothing of it is carried on for longer than a few frames except where the leaves are:
four frames later, which is the distance of the frames that the recipes' models take, it is new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.physics.scene import FRAMES, SIZE

Floats = NDArray[np.float32]

STREAM = 1000  # of random numbers; videos and quadruplets have 0 to 999
# Each at strength 1; pictures have 256 levels.
TEXTURE, ON_THINGS = 22.0, 40.0  # standard deviation in levels
COLOURED = (0.25, 0.4)  # the saturation at which a pixel begins to be a thing's, and is wholly
DRIFT = 3.0  # standard deviation of a texture's motion, pixels a frame
SHAKE = 0.7  # standard deviation of the picture's shift, pixels
LEAVES, FLUTTER, FALL = 8, 2.0, 1.5  # their number; random and mean motion, pixels a frame
LEAF = ((120, 140, 60), (150, 112, 55), (95, 120, 55), (165, 130, 80))
RAIN, STREAK, WATER = 40, 7, 0.5  # drops a frame; their length in pixels; their opacity
WET = (190, 200, 215)
LIGHT, SLOPE = 0.16, 0.12  # standard deviation and mean loss of brightness; of its slope across
CAMERA = 14.0  # standard deviation in levels, of each pixel and colour by itself
PATCH = 8  # pixels of the patches of which `facts` tells
PLACES = (slice(PATCH // 2, SIZE, PATCH),) * 2  # of their centres


class Disturbance:
    """The disturbance of the video of a seed.

    seed: one or more integers from 0; strength: from 0, which changes nothing, to 1; layers: those
    to draw, of LAYERS. Raises ValueError for another strength or layer.
    """

    def __init__(
        self, seed: int | Sequence[int], strength: float, layers: Sequence[str] | None = None
    ) -> None:
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"noise: got {strength}, takes a number from 0 to 1")
        layers = tuple(LAYERS) if layers is None else layers
        for layer in layers:
            if layer not in LAYERS:
                raise ValueError(f"layers: got {layer!r}, takes some of {', '.join(LAYERS)}")
        self.strength, self.layers = strength, layers
        parts = [seed] if isinstance(seed, int) else seed
        self.seed = (STREAM, *parts)
        rng = np.random.default_rng(self.seed)
        self.patterns = [_pattern(rng) for _ in range(4)]
        self.drift = np.cumsum(rng.normal(0, DRIFT, (FRAMES, 4, 2)), axis=0)
        self.drift += rng.uniform(0, SIZE, (4, 2))
        self.turn = rng.uniform(0, 2 * np.pi, (FRAMES, 2))  # the share of two patterns in each
        self.tint = rng.uniform(0.7, 1.3, (2, 3)).astype(np.float32)
        self.shake = rng.normal(0, SHAKE, (FRAMES, 2))
        moved = rng.normal((0, FALL), FLUTTER, (FRAMES, LEAVES, 2))
        self.leaf = rng.uniform(0, SIZE, (LEAVES, 2)) + np.cumsum(moved, axis=0)
        self.leaf %= SIZE + 8
        self.leaf -= 4
        self.leaf_angle = rng.uniform(0, np.pi, (FRAMES, LEAVES))
        self.leaf_size = rng.uniform((2.4, 1.1), (3.6, 1.7), (LEAVES, 2))
        self.leaf_colour = np.array(LEAF, np.float32)[rng.integers(len(LEAF), size=LEAVES)]
        self.light = rng.normal(0, (LIGHT, SLOPE, SLOPE), (FRAMES, 3))

    def __call__(self, pictures: NDArray[np.uint8], frames: Sequence[int]) -> NDArray[np.uint8]:
        """Disturb pictures [..., n, 64, 64, 3], which stand at the n `frames` of their videos."""
        if self.strength == 0:
            return pictures
        picture = pictures.astype(np.float32)
        for name, layer in LAYERS.items():
            if name in self.layers:
                picture = layer(self, picture, frames)
        np.rint(picture, out=picture)
        return np.clip(picture, 0, 255, out=picture).astype(np.uint8)

    def facts(self, frame: int) -> dict[str, Floats]:
        """What a probe may look for in a frame: brightness [1], shift of the picture [2] (down and
        to the right), and of each of the 64 patches of 8 x 8 pixels [64] the texture and the red
        camera noise in its centre and the number of its leaves.
        """
        facts: dict[str, NDArray] = {
            "light": self.light[frame, :1],
            "shake": self.shake[frame],
            "leaves": self._leaves_by_patch(frame),
            "texture": self._field(0, frame)[PLACES].reshape(-1),
            "camera": self._grain(frame)[PLACES][..., 0].reshape(-1),
        }
        return {name: fact.astype(np.float32) for name, fact in facts.items()}

    def _leaves_by_patch(self, frame: int) -> NDArray[np.int64]:
        """[64]: the leaves that are drawn with their centre in each patch."""
        side = SIZE // PATCH
        counts = np.zeros((side, side), np.int64)
        drawn = int(np.ceil(self.strength * LEAVES))
        column, row = np.floor(self.leaf[frame, :drawn] / PATCH).astype(int).T
        inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
        np.add.at(counts, (row[inside], column[inside]), 1)
        return counts.reshape(-1)

    def _rng(self, layer: int, frame: int) -> np.random.Generator:
        return np.random.default_rng((*self.seed, layer, frame))

    def _field(self, which: int, frame: int) -> Floats:
        """[64, 64] of standard deviation 1: a mixture of two patterns, each shifted."""
        total = np.zeros((SIZE, SIZE), np.float32)
        turn = self.turn[frame, which]
        for number, share in ((2 * which, np.cos(turn)), (2 * which + 1, np.sin(turn))):
            shift = np.rint(self.drift[frame, number]).astype(int)
            total += np.float32(share) * np.roll(self.patterns[number], shift, axis=(0, 1))
        return total

    def _texture(self, picture: Floats, frames: Sequence[int]) -> Floats:
        """On the background, and another one on what is coloured: the things."""
        behind, before = (
            np.stack([self._field(which, frame) for frame in frames])[..., None]
            * np.float32(self.strength * scale)
            * self.tint[which]
            for which, scale in enumerate((TEXTURE, ON_THINGS))
        )  # [n, 64, 64, 3]
        share = _coloured(picture)
        thing = np.nonzero(share)
        extra = np.broadcast_to(before - behind, picture.shape)[thing]
        picture += behind
        picture[thing] += share[thing][:, None] * extra
        return picture

    def _shaken(self, picture: Floats, frames: Sequence[int]) -> Floats:
        """Shifted by parts of a pixel; the picture's edge goes on beyond it."""
        moved = np.empty_like(picture)
        for place, frame in enumerate(frames):
            one = picture[..., place, :, :, :]
            for axis, shift in zip((-3, -2), self.strength * self.shake[frame], strict=True):
                whole = int(np.floor(shift))
                part = np.float32(shift - whole)
                index = np.arange(SIZE) - whole
                near, far = (index - k for k in (0, 1))
                near, far = (i.clip(0, SIZE - 1) for i in (near, far))
                one = (1 - part) * one.take(near, axis) + part * one.take(far, axis)
            moved[..., place, :, :, :] = one
        return moved

    def _leafy(self, picture: Floats, frames: Sequence[int]) -> Floats:
        """Small leaves in front of everything; a part of a leaf's number makes it transparent."""
        side = 9
        chosen = list(frames)
        for number in range(LEAVES):
            opacity = np.clip(self.strength * LEAVES - number, 0, 1)
            if opacity == 0:
                break
            at = self.leaf[chosen, number]
            start = np.floor(at - side / 2 + 0.5).astype(int)
            columns, rows = (start[:, axis, None] + np.arange(side) for axis in (0, 1))
            x = (columns + 0.5 - at[:, :1])[:, None, :]
            y = (rows + 0.5 - at[:, 1:])[:, :, None]
            angle = self.leaf_angle[chosen, number][:, None, None]
            long, wide = self.leaf_size[number]
            u = (np.cos(angle) * x + np.sin(angle) * y) / long
            v = (np.cos(angle) * y - np.sin(angle) * x) / wide
            cover = opacity * np.clip(0.5 + wide * (1 - np.hypot(u, v)), 0, 1)
            inside = (rows >= 0) & (rows < SIZE)
            cover *= inside[:, :, None] & ((columns >= 0) & (columns < SIZE))[:, None, :]
            rows, columns = rows.clip(0, SIZE - 1), columns.clip(0, SIZE - 1)
            where: Any = (
                ...,
                np.arange(len(chosen))[:, None, None],
                rows[:, :, None],
                columns[:, None, :],
                slice(None),
            )
            patch = picture[where]
            # Pixels beyond the edge have no cover and would overwrite those at the edge.
            np.add.at(
                picture,
                where,
                cover[..., None].astype(np.float32) * (self.leaf_colour[number] - patch),
            )
        return picture

    def _rainy(self, picture: Floats, frames: Sequence[int]) -> Floats:
        """Slanting streaks, new ones in every frame."""
        along = np.arange(STREAK)
        drops = round(self.strength * RAIN)
        wet = np.zeros((len(frames), SIZE, SIZE), bool)
        for place, frame in enumerate(frames):
            x, y = self._rng(0, frame).uniform(-STREAK, SIZE, (2, RAIN, 1))[:, :drops]
            rows = np.floor(y + along).astype(int)
            columns = np.floor(x + 0.25 * along).astype(int)
            seen = (rows >= 0) & (rows < SIZE) & (columns >= 0) & (columns < SIZE)
            wet[place, rows[seen], columns[seen]] = True
        there = np.nonzero(np.broadcast_to(wet, picture.shape[:-1]))
        dry = picture[there]
        picture[there] = dry + WATER * (np.array(WET, np.float32) - dry)
        return picture

    def _lit(self, picture: Floats, frames: Sequence[int]) -> Floats:
        """Brighter or darker, and with a slope across the picture."""
        across = np.linspace(-1, 1, SIZE)
        level, right, down = (self.strength * self.light[list(frames)].T)[..., None, None]
        gain = np.exp(
            level - self.strength * LIGHT + right * across + down * across[:, None]
        )  # [n, 64, 64]
        picture *= gain[..., None].astype(np.float32)
        return picture

    def _noisy(self, picture: Floats, frames: Sequence[int]) -> Floats:
        grain = np.stack([self._grain(frame) for frame in frames])
        grain *= np.float32(self.strength * CAMERA)
        picture += grain
        return picture

    def _grain(self, frame: int) -> Floats:
        return self._rng(1, frame).standard_normal((SIZE, SIZE, 3), dtype=np.float32)


def of_possible(seed: int, strength: float) -> Disturbance:
    """That of the training video `possible(seed)`."""
    return Disturbance((0, seed), strength)


def of_quadruplet(number: int, seed: int, strength: float) -> Disturbance:
    """That of all four videos of a quadruplet; number: of its property, from 1."""
    return Disturbance((number, seed), strength)


LAYERS: dict[str, Callable[[Disturbance, Floats, Sequence[int]], Floats]] = {
    "texture": Disturbance._texture,
    "shake": Disturbance._shaken,
    "leaves": Disturbance._leafy,
    "rain": Disturbance._rainy,
    "light": Disturbance._lit,
    "camera": Disturbance._noisy,
}


def _pattern(rng: np.random.Generator) -> Floats:
    """[64, 64]: smooth and periodic, of mean 0 and standard deviation 1; waves of 6 pixels on."""
    wave = np.fft.fftfreq(SIZE)
    low = np.exp(-((wave**2 + wave[:, None] ** 2) * 9.0**2) / 2)
    low[0, 0] = 0.0
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIZE, SIZE))) * low).real
    return (noise / noise.std()).astype(np.float32)


def _coloured(picture: Floats) -> Floats:
    """[...] from 0 to 1: how surely a pixel of [..., 3] is a thing's, by its saturation."""
    red, green, blue = np.moveaxis(picture, -1, 0)
    most = np.maximum(np.maximum(red, green), blue)
    least = np.minimum(np.minimum(red, green), blue)
    low, high = COLOURED
    return np.clip((1 - least / np.maximum(most, 1) - low) / (high - low), 0, 1)
