"""The film of an episode: the map, what is seen, the goal's picture, and the surprise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vicreg_jepa.act.episodes import Acted, Scene
from vicreg_jepa.recall.figure import seen
from vicreg_jepa.recall.visits import Visit
from vicreg_jepa.worlds.pictures import mixed
from vicreg_jepa.worlds.window import MazeWindow
from vicreg_jepa.worlds.world import REACHED, State

SCALE, SMALL, EDGE, SIDE = 5, 6, 12, 260  # of the map and the windows; margins and the right column
EVERY, MILLISECONDS, AFTER = 3, 90, 24  # steps a picture, and the steps that follow the arrival
DARK = 0.45  # of what was not in view yet
DOT, SUBGOAL, GOAL, ZONE, SURPRISE = "#ce2828", "#2868c8", "#28964a", "#e08a1e", "#7a3fa0"
INK, PAPER, GREY = "#20242c", "#ffffff", "#b4bac4"
FONT = ImageFont.load_default(13)


def chosen(scene: Scene, world: MazeWindow, its: Acted) -> int:
    """The successful episode that the shield changes most, of those with the longer ways."""
    length = world.distance(scene.state._replace(position=scene.push.places))
    fits = its.success & (length >= length.median())
    return int(torch.where(fits, its.changed.sum(dim=1), -1).argmax())


def animate(world: MazeWindow, scene: Scene, led: Visit, its: Acted, path: Path) -> None:
    """Write a GIF of one episode of the whole system."""
    film = _Film(world, scene, led, its, chosen(scene, world, its))
    frames = [film.frame(step) for step in range(0, film.last + 1, EVERY)]
    first = frames[0].quantize(96)
    rest = [frame.quantize(palette=first) for frame in frames[1:]]
    first.save(
        path, save_all=True, append_images=rest, duration=MILLISECONDS, loop=0, optimize=True
    )


class _Film:
    """One episode, by its number. Places are on the map: those of the system in the frame of its
    memory, which began where the first visit did.
    """

    def __init__(
        self, world: MazeWindow, scene: Scene, led: Visit, its: Acted, number: int
    ) -> None:
        self.world = world
        self.state = scene.state.rows(slice(number, number + 1))
        self.zone = scene.zone.rows(torch.tensor([number]))
        begin = world.reset(self.state.seed).position[0]
        self.remembered = led.positions[number, ::4]
        self.positions = its.positions[number]
        self.places, self.subgoals = its.places[number] + begin, its.subgoals[number] + begin
        self.changed, self.alarms = its.changed[number], its.alarms[number]
        self.surprise, self.alarm = its.surprise[number], its.alarm

    @property
    def last(self) -> int:
        """The last step to be shown: some after the dot came to the goal to stay."""
        apart = torch.linalg.vector_norm(self.positions - self.state.goal[0], dim=1)
        away = (apart > REACHED).nonzero()[:, 0]
        return min(int(away[-1]) + AFTER if len(away) else AFTER, len(self.positions) - 1)

    def frame(self, step: int) -> Image.Image:
        edge = self.world.maze.size * SCALE
        picture = Image.new("RGB", (edge + SIDE + 3 * EDGE, edge + 2 * EDGE + 34), PAPER)
        pen = ImageDraw.Draw(picture)
        now = self.state._replace(position=self.positions[step : step + 1])
        picture.paste(self._map(now, step, edge), (EDGE, EDGE))
        right, top = edge + 2 * EDGE, EDGE
        views = (
            ("what it sees", now),
            ("the picture of the goal", self.state._replace(position=self.state.goal)),
        )
        for words, view in views:
            window = Image.fromarray(mixed(self.world.render(view))[0])
            size = self.world.size * SMALL - 40
            pen.text((right, top), words, INK, FONT)
            picture.paste(window.resize((size, size), Image.Resampling.NEAREST), (right, top + 18))
            pen.rectangle((right, top + 18, right + size, top + 18 + size), outline=GREY)
            top += size + 28
        self._draw_surprise(pen, step, (right, top, right + SIDE, edge + EDGE))
        pen.text((EDGE, edge + EDGE + 10), self._words(step), INK, ImageFont.load_default(15))
        return picture

    def _map(self, now: State, step: int, edge: int) -> Image.Image:
        walked = self.positions[: step + 1]
        ground = mixed(self.world.map(now))[0].astype(np.float32)
        ground[~seen(self.world, walked).numpy()] *= DARK
        picture = Image.fromarray(ground.round().astype(np.uint8))
        picture = picture.resize((edge, edge), Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(picture)
        for place in self.remembered.tolist():
            _disc(pen, place, 0.25, SUBGOAL)
        _disc(pen, self.zone.centre[0].tolist(), float(torch.as_tensor(self.zone.radius)), ZONE)
        _line(pen, _parts(walked), DOT)
        x, y = (SCALE * z for z in self.state.goal[0].tolist())
        pen.line((x - 8, y, x + 8, y), GOAL, 3)
        pen.line((x, y - 8, x, y + 8), GOAL, 3)
        if self._is_located(step):
            _ring(pen, self.places[step].tolist(), 3.0, INK)
        if step and bool(torch.isfinite(self.subgoals[step - 1]).all()):
            _ring(pen, self.subgoals[step - 1].tolist(), 1.8, SUBGOAL)
        return picture

    def _draw_surprise(
        self, pen: ImageDraw.ImageDraw, step: int, box: tuple[int, int, int, int]
    ) -> None:
        left, top, right, bottom = box
        pen.text((left, top), "surprise of each step, and the alarm", INK, FONT)
        top += 20
        curve, steps = self.surprise, len(self.surprise)
        most = max(float(curve.max()), self.alarm)

        def at(time: float, value: float) -> tuple[float, float]:
            return left + (right - left) * time / steps, bottom - (bottom - top) * value / most

        pen.rectangle((left, top, right, bottom), outline=GREY)
        pen.line([at(0, self.alarm), at(steps, self.alarm)], ZONE, 1)
        points = [at(time + 1, value) for time, value in enumerate(curve[:step].tolist())]
        if len(points) > 1:
            pen.line(points, SURPRISE, 2)

    def _is_located(self, step: int) -> bool:
        return bool(torch.isfinite(self.places[step]).all())

    def _words(self, step: int) -> str:
        """What the system does in the steps since the last picture."""
        loud = self.alarms[:step].nonzero()[:, 0]
        if len(loud) and step - int(loud[-1]) <= 4 * EVERY:
            words = "surprised, it has been put elsewhere"
        elif self._is_located(step):
            words = "it knows where it is, and walks to its subgoal"
        else:
            words = "it looks for where it is"
        if bool(self.changed[max(0, step - EVERY) : step].any()):
            words += "; the shield intervenes"
        return f"step {step}: {words}"


def _parts(places: Tensor) -> list[list[list[float]]]:
    """The pieces of a path [T, 2] between jumps."""
    jumps = (places.diff(dim=0).abs().amax(dim=1) > 4).nonzero()[:, 0] + 1
    return [part.tolist() for part in torch.tensor_split(places, jumps.tolist())]


def _line(
    pen: ImageDraw.ImageDraw, parts: Sequence[Sequence[Sequence[float]]], colour: str
) -> None:
    for part in parts:
        if len(part) > 1:
            pen.line([(SCALE * x, SCALE * y) for x, y in part], colour, 3)


def _disc(pen: ImageDraw.ImageDraw, place: Sequence[float], radius: float, colour: str) -> None:
    pen.ellipse(_around(place, radius), fill=colour)


def _ring(pen: ImageDraw.ImageDraw, place: Sequence[float], radius: float, colour: str) -> None:
    pen.ellipse(_around(place, radius), outline=colour, width=3)


def _around(place: Sequence[float], radius: float) -> tuple[float, float, float, float]:
    x, y = place
    return (
        SCALE * (x - radius), SCALE * (y - radius), SCALE * (x + radius), SCALE * (y + radius),
    )  # fmt: skip
