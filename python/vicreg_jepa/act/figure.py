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


def chosen(scene: Scene, world: MazeWindow, its: Acted) -> int:
    """The successful episode that the shield changes most, of those with the longer ways."""
    length = world.distance(scene.state._replace(position=scene.push.places))
    fits = its.success & (length >= length.median())
    return int(torch.where(fits, its.changed.sum(dim=1), -1).argmax())


def animate(world: MazeWindow, scene: Scene, led: Visit, its: Acted, path: Path) -> None:
    """Write a GIF of one episode of the whole system."""
    number = chosen(scene, world, its)
    state = scene.state.rows(slice(number, number + 1))
    begin = world.reset(state.seed).position[0]  # of the first visit, where its frame begins
    near = torch.linalg.vector_norm(its.positions[number] - state.goal[0], dim=1) <= REACHED
    away = (~near).nonzero()[:, 0]
    last = min(int(away[-1]) + AFTER if len(away) else AFTER, its.positions.shape[1] - 1)
    frames = [
        _frame(world, scene, led, its, number, state, begin, step)
        for step in range(0, last + 1, EVERY)
    ]
    first = frames[0].quantize(96)
    rest = [frame.quantize(palette=first) for frame in frames[1:]]
    first.save(
        path, save_all=True, append_images=rest, duration=MILLISECONDS, loop=0, optimize=True
    )


def _frame(
    world: MazeWindow,
    scene: Scene,
    led: Visit,
    its: Acted,
    number: int,
    state: State,
    begin: Tensor,
    step: int,
) -> Image.Image:
    edge = world.maze.size * SCALE
    picture = Image.new("RGB", (edge + SIDE + 3 * EDGE, edge + 2 * EDGE + 34), PAPER)
    pen = ImageDraw.Draw(picture)
    now = state._replace(position=its.positions[number, step : step + 1])
    walked = its.positions[number, : step + 1]
    ground = mixed(world.map(now))[0].astype(np.float32)
    ground[~seen(world, walked).numpy()] *= DARK
    map_ = Image.fromarray(ground.round().astype(np.uint8)).resize(
        (edge, edge), Image.Resampling.NEAREST
    )
    _draw_map(ImageDraw.Draw(map_), scene, led, its, number, state, begin, step)
    picture.paste(map_, (EDGE, EDGE))
    right, top = edge + 2 * EDGE, EDGE
    font = ImageFont.load_default(13)
    views = (
        ("what it sees", now),
        ("the picture of the goal", state._replace(position=state.goal)),
    )
    for words, view in views:
        window = Image.fromarray(mixed(world.render(view))[0])
        size = world.size * SMALL - 40
        pen.text((right, top), words, INK, font)
        picture.paste(window.resize((size, size), Image.Resampling.NEAREST), (right, top + 18))
        pen.rectangle((right, top + 18, right + size, top + 18 + size), outline=GREY)
        top += size + 28
    _draw_surprise(pen, its, number, step, (right, top, right + SIDE, edge + EDGE), font)
    pen.text((EDGE, edge + EDGE + 10), _words(its, number, step), INK, ImageFont.load_default(15))
    return picture


def _draw_map(
    pen: ImageDraw.ImageDraw,
    scene: Scene,
    led: Visit,
    its: Acted,
    number: int,
    state: State,
    begin: Tensor,
    step: int,
) -> None:
    for place in led.positions[number, ::4].tolist():
        _disc(pen, place, 0.25, SUBGOAL)
    radius = float(torch.as_tensor(scene.zone.radius))
    _disc(pen, scene.zone.centre[number].tolist(), radius, ZONE)
    _line(pen, _parts(its.positions[number, : step + 1]), DOT)
    x, y = (SCALE * z for z in state.goal[0].tolist())
    pen.line((x - 8, y, x + 8, y), GOAL, 3)
    pen.line((x, y - 8, x, y + 8), GOAL, 3)
    place = its.places[number, step]
    if bool(torch.isfinite(place).all()):
        _ring(pen, (place + begin).tolist(), 3.0, INK)
    if step and bool(torch.isfinite(its.subgoals[number, step - 1]).all()):
        _ring(pen, (its.subgoals[number, step - 1] + begin).tolist(), 1.8, SUBGOAL)


def _draw_surprise(
    pen: ImageDraw.ImageDraw,
    its: Acted,
    number: int,
    step: int,
    box: tuple[int, int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    left, top, right, bottom = box
    pen.text((left, top), "surprise of each step, and the alarm", INK, font)
    top += 20
    curve = its.surprise[number]
    most = float(torch.maximum(curve.max(), curve.new_tensor(its.alarm)))
    steps = len(curve)

    def at(t: float, value: float) -> tuple[float, float]:
        return left + (right - left) * t / steps, bottom - (bottom - top) * value / most

    pen.rectangle((left, top, right, bottom), outline=GREY)
    pen.line([at(0, its.alarm), at(steps, its.alarm)], ZONE, 1)
    points = [at(t + 1, value) for t, value in enumerate(curve[:step].tolist())]
    if len(points) > 1:
        pen.line(points, SURPRISE, 2)


def _words(its: Acted, number: int, step: int) -> str:
    """What the system does in the steps since the last picture."""
    recent = slice(max(0, step - EVERY), step)
    located = bool(torch.isfinite(its.places[number, step]).all())
    words = f"step {step}: "
    since = (its.alarms[number, :step]).nonzero()[:, 0]
    if len(since) and step - int(since[-1]) <= 4 * EVERY:
        words += "surprised, it has been put elsewhere"
    elif not located:
        words += "it looks for where it is"
    else:
        words += "it knows where it is, and walks to its subgoal"
    if bool(its.changed[number, recent].any()):
        words += "; the shield intervenes"
    return words


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
