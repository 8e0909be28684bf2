"""`vicreg-jepa plan` of runs on a gymnasium environment: the table and the pictures of episodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from vicreg_jepa.planning import adapted
from vicreg_jepa.planning.adapted import Make, Played
from vicreg_jepa.planning.planner import Planner
from vicreg_jepa.planning.report import COLLECTION, NEAR, Row, row_of_control
from vicreg_jepa.planning.ways import above_of, ways
from vicreg_jepa.worlds.adapter import seed_of
from vicreg_jepa.worlds.collect import adapted as adapter_of
from vicreg_jepa.worlds.pictures import mixed
from vicreg_jepa.worlds.world import STEPS

SHOWN, ROWS = 8, 4  # frames of an episode, and episodes, in the picture
EDGE, GAP = 128, 4  # pixels of a frame in a picture, and between frames
HEAD, NOTE, INK = 20, 80, (0, 0, 0)  # the titles above the frames, and the words behind them
MILLISECONDS = 80  # of a frame of the GIF


def maker(described: dict[str, Any]) -> Make:
    """Return a function that makes the environment that trajectories were collected in.

    described: their origin, as `collect` wrote it. Raises ValueError for another origin.
    """
    try:
        arguments = (described["world"], described["settings"], described["history"],
                     described["repeat"])  # fmt: skip
    except KeyError as error:
        raise ValueError(
            f"data.path: its trajectories do not name {error.args[0]!r}; takes those that "
            "`vicreg-jepa collect` wrote of a gymnasium environment"
        ) from error

    def make() -> adapted.Adapter:
        return adapter_of(*arguments)

    return make


def steps_of(make: Make) -> int:
    """The steps of an episode: the limit of the environment, or else that of the worlds."""
    with closing(make()) as one:
        spec = one.env.spec
        limit = STEPS if spec is None or spec.max_episode_steps is None else spec.max_episode_steps
        return math.ceil(limit / one.repeat)


def measured(
    runs: Sequence[tuple[str, nn.Module]],
    make: Make,
    planner: Planner,
    count: int,
    low: Planner | None = None,
) -> tuple[list[Row], Played]:
    """The rows of the table, controls first, and the episodes of the first run. low: the planner
    of the lowest level, for methods with levels, which have controls of their own: see `ways`.
    """
    seeds = torch.tensor([seed_of(COLLECTION, number) for number in range(count)])
    steps = steps_of(make)
    with closing(make()) as one:
        controls = () if one.task is None else tuple(one.task.controls)
    policies = {"walk": adapted.walk} | {name: adapted.control(name) for name in controls}
    rows = [
        Row(name, count, int(adapted.followed(make, policy, seeds, steps).success.sum()))
        for name, policy in policies.items()
    ]
    first: Played | None = None
    for name, method in runs:
        near = NEAR * adapted.step_length(method, make, COLLECTION + 1)
        for way in ways(planner, low, above_of(method), full=False):
            played, planned = adapted.episodes(
                method, make, way.planner, seeds, near, steps, way.energy
            )
            row = row_of_control(f"{name}{way.kind}", played.success, planned)
            rows.append(replace(row, of=way.of(name)))
            if first is None and not way.kind:
                first = played
    assert first is not None
    return rows, first


def _coloured(frames: Tensor, history: int) -> NDArray[np.uint8]:
    """[N, H, W, 3] of the newest of each stack of frames, uint8 [N, H, W, history * C]: as RGB for
    three channels, as dot and walls for two, else the last channel as grey.
    """
    newest = frames[..., -(frames.shape[-1] // history) :]
    if newest.shape[-1] == 2:
        return mixed(newest)
    if newest.shape[-1] != 3:
        newest = newest[..., -1:].expand(*newest.shape[:3], 3)
    return newest.numpy()


def _pasted(frames: NDArray[np.uint8]) -> Image.Image:
    """Frames [N, H, W, 3] side by side."""
    strip = Image.new("RGB", (len(frames) * (EDGE + GAP) - GAP, EDGE), "white")
    for place, frame in enumerate(frames):
        enlarged = Image.fromarray(frame).resize((EDGE, EDGE), Image.Resampling.NEAREST)
        strip.paste(enlarged, (place * (EDGE + GAP), 0))
    return strip


def _chosen(played: Played) -> list[int]:
    """The episodes that are drawn: the first ones, and a failure, if there is one, as the last."""
    numbers = list(range(min(ROWS, len(played.success))))
    failures = (~played.success).nonzero()[:, 0].tolist()
    if failures and failures[0] not in numbers:
        numbers[-1] = failures[0]
    return numbers


def draw(played: Played, history: int, path: Path) -> None:
    """A row for each of some episodes: the goal, frames from the first to the last, and whether the
    goal was reached. Writes a PNG.
    """
    times = torch.linspace(0, played.frames.shape[1] - 1, SHOWN).round().long()
    rows = []
    for number in _chosen(played):
        some = torch.cat([played.goals[number][None], played.frames[number, times]])
        rows.append((_pasted(_coloured(some, history)), bool(played.success[number])))
    width = rows[0][0].width + GAP + NOTE
    sheet = Image.new("RGB", (width, HEAD + len(rows) * (EDGE + GAP) - GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, title in enumerate(["goal", *(f"step {time}" for time in times.tolist())]):
        pen.text((column * (EDGE + GAP) + 4, 2), title, INK, font)
    for place, (row, success) in enumerate(rows):
        top = HEAD + place * (EDGE + GAP)
        sheet.paste(row, (0, top))
        pen.text((row.width + GAP, top + EDGE // 2 - 8), "reached" if success else "not reached",
                 INK, font)  # fmt: skip
    sheet.save(path)


def animate(played: Played, history: int, path: Path) -> None:
    """The last of these episodes as a GIF, with its goal beside it."""
    number = _chosen(played)[-1]
    goal = _coloured(played.goals[number][None], history)
    frames = _coloured(played.frames[number], history)
    films = [_pasted(np.concatenate([goal, frame[None]])) for frame in frames]
    films[0].save(
        path, save_all=True, append_images=films[1:], duration=MILLISECONDS, loop=0, optimize=True
    )
