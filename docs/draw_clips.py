"""Draws clips of possible and impossible events with PIL and matplotlib, not with the package's
renderer, and measures what `surprise --pretrained --video` says of them.

.venv/bin/python docs/draw_clips.py --output runs/clips
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import av
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

matplotlib.use("Agg")
from matplotlib import patches, pyplot
from vicreg_jepa import pretrained
from vicreg_jepa.data import videos
from vicreg_jepa.evaluation.auroc import auroc
from vicreg_jepa.surprise import calibration, curves
from vicreg_jepa.training.run import restore

FRAMES, EDGE = 36, 256  # the model sees 64 x 64 pixels
FLOOR, BREAK = 52.0, 18  # the height of the floor, of 64; the frame of an event in view
BLUE, RED, GREEN = (40, 90, 200), (205, 50, 50), (50, 150, 70)


@dataclass(frozen=True)
class Ball:
    """Where it is in a picture of 64 x 64, its radius and colour."""

    x: float
    y: float
    radius: float = 5.0
    colour: tuple[int, int, int] = BLUE


Path_ = list[Ball | None]  # of each frame; None: it is not there


def roll(start: float = 8.0, speed: float = 1.3) -> Path_:
    return [Ball(start + speed * t, FLOOR - 5) for t in range(FRAMES)]


def bounce(x: float = 24.0, gravity: float = 0.35, kept: float = 0.8) -> Path_:
    y, down, path = 10.0, 0.0, []
    for _ in range(FRAMES):
        path.append(Ball(x, y, colour=RED))
        down += gravity
        y += down
        if y > FLOOR - 5:
            y, down = 2 * (FLOOR - 5) - y, -kept * down
    return path


def throw(gravity: float = 0.3) -> Path_:
    return [
        Ball(6 + 1.5 * t, FLOOR - 6 - 4.6 * t + gravity * t * t / 2, colour=GREEN)
        for t in range(31)
    ] + [None] * (FRAMES - 31)


def vanished(path: Path_) -> Path_:
    return [*path[:BREAK], *([None] * (FRAMES - BREAK))]


def jumped(path: Path_) -> Path_:
    return [p and (p if t < BREAK else replace(p, x=p.x + 18)) for t, p in enumerate(path)]


def turned(path: Path_) -> Path_:
    return [*path[:BREAK], *path[BREAK - 2 :: -1], *([None] * FRAMES)][:FRAMES]


def recoloured(path: Path_) -> Path_:
    return [p and (p if t < BREAK else replace(p, colour=GREEN)) for t, p in enumerate(path)]


def grown(path: Path_) -> Path_:
    return [p and (p if t < BREAK else replace(p, radius=8.0)) for t, p in enumerate(path)]


# scene -> the possible path, whether a screen stands in front, and the impossible paths
SCENES: dict[str, tuple[Path_, bool, dict[str, Path_]]] = {
    "roll": (roll(), False, {"vanishes": vanished(roll()), "jumps": jumped(roll())}),
    "bounce": (
        bounce(),
        False,
        {"turns round": turned(bounce()), "changes colour": recoloured(bounce())},
    ),
    "throw": (throw(), False, {"grows": grown(throw())}),
    "hidden": (
        roll(),
        True,
        {"vanishes": vanished(roll()), "changes colour": recoloured(roll())},
    ),
}
SCREEN = (22.0, 34.0, 40.0, 54.0)  # left, top, right, bottom


def flat(ball: Ball | None, screen: bool) -> NDArray[np.uint8]:
    """PIL: plain colours on a light grey, as pictures of textbooks are."""
    return _pil(ball, screen, (225, 225, 220), (170, 160, 150), shaded=False)


def shaded(ball: Ball | None, screen: bool) -> NDArray[np.uint8]:
    """PIL: a ball with light and shade, a sky that grows darker, and a shadow on the floor."""
    return _pil(ball, screen, (150, 180, 205), (105, 125, 95), shaded=True)


def _pil(
    ball: Ball | None,
    screen: bool,
    sky: tuple[int, int, int],
    ground: tuple[int, int, int],
    shaded: bool,
) -> NDArray[np.uint8]:
    scale = 2 * EDGE / 64
    picture = Image.new("RGB", (2 * EDGE, 2 * EDGE), sky)
    draw = ImageDraw.Draw(picture)
    if shaded:
        for row in range(2 * EDGE):
            light = 0.75 + 0.25 * row / (2 * EDGE)
            draw.line((0, row, 2 * EDGE, row), fill=tuple(int(light * c) for c in sky))
    draw.rectangle((0, FLOOR * scale, 2 * EDGE, 2 * EDGE), fill=ground)
    if ball is not None:
        if shaded:
            dark = tuple(int(0.7 * c) for c in ground)
            wide = ball.radius
            box = (ball.x - wide, FLOOR, ball.x + wide, FLOOR + 2)
            draw.ellipse(tuple(scale * c for c in box), fill=dark)
        for share in (1.0, 0.8, 0.6, 0.4) if shaded else (1.0,):
            r, away = ball.radius * share, 0.3 * ball.radius * (1 - share)
            box = (ball.x - away - r, ball.y - away - r, ball.x - away + r, ball.y - away + r)
            lit = tuple(int(c + (255 - c) * 0.5 * (1 - share)) for c in ball.colour)
            draw.ellipse(tuple(scale * c for c in box), fill=lit)
    if screen:
        draw.rectangle(tuple(scale * c for c in SCREEN), fill=(120, 120, 125))
    return np.asarray(picture.resize((EDGE, EDGE), Image.Resampling.BOX))


def plotted(ball: Ball | None, screen: bool) -> NDArray[np.uint8]:
    """matplotlib: discs with a dark outline on a white page."""
    figure = pyplot.figure(figsize=(2.56, 2.56), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 64)
    axes.set_ylim(64, 0)
    axes.axis("off")
    axes.add_patch(patches.Rectangle((-1, FLOOR), 66, 13, facecolor="#c8b89a"))
    if ball is not None:
        colour = [c / 255 for c in ball.colour]
        axes.add_patch(
            patches.Circle((ball.x, ball.y), ball.radius, facecolor=colour, edgecolor="k")
        )
    if screen:
        left, top, right, bottom = SCREEN
        axes.add_patch(
            patches.Rectangle((left, top), right - left, bottom - top, facecolor="#888888")
        )
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    pyplot.close(figure)
    return picture


RENDERERS: tuple[Callable[[Ball | None, bool], NDArray[np.uint8]], ...] = (flat, shaded, plotted)


def write(path: Path, pictures: list[NDArray[np.uint8]]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.width = stream.height = EDGE
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, default=Path("runs/clips"))
    output = options.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    file = pretrained.path("surprise")
    settings, method, _ = restore(file)
    calibrated = calibration.calibrated(method, settings, calibration.beside(file))
    limits = {rate: calibration.threshold(calibrated.peaks, rate) for rate in (0.05, 0.2)}
    print("thresholds", {rate: round(limit, 2) for rate, limit in limits.items()})
    possible: list[float] = []
    impossible: list[float] = []
    told = 0

    def measured(name: str, pictures: list[NDArray[np.uint8]]) -> float:
        clip = output / f"{name}.mp4"
        write(clip, pictures)
        video = videos.decode(clip, settings.data.size)[None]
        stride = settings.data.stride
        (curve,) = curves.curves(method, video, stride=stride, expected=calibrated.expected)
        at = int(curve.local.nan_to_num(-np.inf).argmax())
        print(f"{name:<32} {curve.peak:6.2f} at {at:2d}")
        return curve.peak

    for renderer in RENDERERS:
        for scene, (path, screen, broken) in SCENES.items():
            name = f"{renderer.__name__}, {scene}"
            possible.append(measured(name, [renderer(ball, screen) for ball in path]))
            for event, other in broken.items():
                pictures = [renderer(ball, screen) for ball in other]
                impossible.append(measured(f"{name}, {event}", pictures))
                told += impossible[-1] > possible[-1]
    for rate, limit in limits.items():
        false, hits = (sum(peak > limit for peak in some) for some in (possible, impossible))
        alarms = f"{false} false alarms of {len(possible)}, {hits} hits of {len(impossible)}"
        print(f"at {rate}: {alarms}")
    print(f"above the possible clip of the same scene: {told} of {len(impossible)}")
    print(f"AUROC {100 * auroc(possible, impossible):.1f}")


if __name__ == "__main__":
    main()
