"""Pictures of planned episodes: frames, planned and executed paths, the energy of the plans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vicreg_jepa.planning.evaluate import Result
from vicreg_jepa.planning.model import encoded
from vicreg_jepa.planning.planner import Plan
from vicreg_jepa.worlds.pictures import painted
from vicreg_jepa.worlds.world import State, World

GRID = 1.5  # pixels between the positions that latents are compared with
SCALE = 5
LEVELS = ("#c07a10", "#7a3fb0")  # the levels above the lowest
EXECUTED, PLANNED, SHORTEST = "#ce2828", "#2868c8", "#9aa0aa"
LABELS = 7  # about so many plans have their step written beside their energies
MILLISECONDS = 80  # of a frame of the GIF


class Decoder:
    """Reads positions from latents of one environment: of all positions of a grid, the one whose
    frame has the nearest latent. It trains nothing and uses no label, but it knows the world.
    state: of one environment.
    """

    def __init__(self, model: Any, world: World, state: State) -> None:
        ticks = torch.arange(0.0, world.size, GRID)
        places = torch.cartesian_prod(ticks, ticks)
        layout = state.layout.expand(len(places), *state.layout.shape[1:])
        self.places = places[world.inside(places, layout)]
        count = len(self.places)
        every = State(*(field.expand(count, *field.shape[1:]) for field in state))
        every = every._replace(position=self.places)
        self.latents = encoded(model, world, State(*(field[None] for field in every)))[0]

    def __call__(self, path: Tensor) -> Tensor:
        """Positions [H, 2] of the latents [H, D]."""
        return self.places[torch.cdist(path, self.latents).argmin(dim=1)]


def _plan_path(plan: Plan, number: int) -> Tensor:
    """The predicted latents of a plan, without what lies beyond its horizon."""
    path = plan.path[number]
    return path[~torch.isnan(path[:, 0])]


def chosen(result: Result) -> list[int]:
    """Four episodes by the length of their shortest path, the shortest to the longest; a failure,
    if there is one, replaces the last.
    """
    order = result.distance.argsort().tolist()
    places = torch.linspace(0, len(order) - 1, 4).round().long().tolist()
    numbers = list(dict.fromkeys(order[place] for place in places))
    failures = (~result.success).nonzero()[:, 0].tolist()
    if failures and failures[0] not in numbers:
        numbers[-1] = failures[0]
    return numbers


def draw(
    model: Any, world: World, seeds: Tensor, result: Result, interval: int, path: Path
) -> None:
    """A row for each of four episodes: the first frame with the goal and the path of the first
    plan, on all its levels; the executed path, and with levels the subgoal of each plan; the energy
    of each plan over its iterations, with levels that of the lowest. Writes a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers = chosen(result)
    start = world.reset(seeds)
    figure, axes = pyplot.subplots(
        len(numbers), 3, figsize=(10.5, 3.4 * len(numbers)), layout="constrained", squeeze=False,
        gridspec_kw={"width_ratios": (1, 1, 1.35)},
    )  # fmt: skip
    for row, number in zip(axes, numbers, strict=True):
        state = start.rows(slice(number, number + 1))
        way = torch.tensor(world.way(state)[0])
        extent = (0, world.size, world.size, 0)
        for axis in row[:2]:
            axis.imshow(painted(world, state)[0], extent=extent, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        decode, plan = Decoder(model, world, state), result.plans[0]
        places = decode(_plan_path(plan, number))
        row[0].plot(*way.T, color=SHORTEST, linewidth=1.2, linestyle="--", label="shortest path")
        row[0].plot(*places.T, ".-", color=PLANNED, linewidth=1, markersize=3, label="first plan")
        for level, upper in enumerate(plan.above):
            goals = torch.cat([state.position, decode(upper.path[number])])
            row[0].plot(*goals.T, "o-", color=LEVELS[level % len(LEVELS)], linewidth=0.8,
                        markersize=4, fillstyle="none", label=f"level {level + 2}")  # fmt: skip
        if plan.above:
            firsts = [each.above[0].goal[number, None] for each in result.plans]
            reached = result.steps()[number] // interval + 1
            goals = decode(torch.cat(firsts[: int(reached)]))
            row[1].plot(*goals.T, "o", color=LEVELS[0], markersize=3, fillstyle="none")
        row[0].set_title(f"first plan, shortest path {float(result.distance[number]):.0f} pixels",
                         fontsize=8)  # fmt: skip
        row[0].legend(
            fontsize=7,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=2 + len(plan.above),
            frameon=False,
        )
        row[1].plot(*result.positions[number].T, color=EXECUTED, linewidth=1.6)
        steps = int(result.steps()[number])
        last = result.positions.shape[1] - 1
        ended = "there at the end" if result.success[number] else "not there at the end"
        first = f"at the goal at step {steps}, " if steps <= last else ""
        row[1].set_title(f"executed: {first}{ended}", fontsize=8)
        _energies(row[2], result, number, interval)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _energies(axis: Any, result: Result, number: int, interval: int) -> None:
    """A curve for each plan that was searched for, one after the other. A curve is broken where the
    energy rises: the horizon has grown, and energies of different horizons cannot be compared.
    """
    place = 0
    counts = [int((~torch.isnan(plan.history[number])).sum()) for plan in result.plans]
    apart, last = sum(counts) / LABELS, -torch.inf  # iterations between the labels of two plans
    for count, plan in enumerate(result.plans):
        history = plan.history[number]
        history = history[~torch.isnan(history)]
        if not len(history):
            continue
        axis.axvline(place + 0.5, color=SHORTEST, linewidth=0.8, linestyle=":")
        if place - last >= apart and sum(counts) - place >= apart / 2:
            last = place
            axis.text(place + 0.6, 0.99, f"step {count * interval}", fontsize=7, va="top",
                      transform=axis.get_xaxis_transform())  # fmt: skip
        steps = torch.arange(len(history)) + place + 1
        breaks = ((history[1:] > history[:-1]).nonzero()[:, 0] + 1).tolist()
        for part in torch.tensor_split(torch.arange(len(history)), breaks):
            axis.plot(steps[part], history[part], ".-", color=PLANNED, linewidth=1)
        place += len(history)
    axis.set_xlabel("iteration", fontsize=8)
    axis.set_ylabel("lowest energy so far", fontsize=8)
    axis.set_title(f"{int(result.iterations[number])} iterations in all", fontsize=9)
    axis.set_xlim(0, max(place, 1) + 1)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)


def animate(
    model: Any, world: World, seeds: Tensor, result: Result, number: int, interval: int, path: Path
) -> None:
    """Writes one episode as a GIF: the frame, the current plan in blue, the executed path in
    red, and the latents of the plans above, level by level, as rings.
    """
    state = world.reset(seeds).rows(slice(number, number + 1))
    last = min(int(result.steps()[number]) + 10, result.positions.shape[1] - 1)
    frames, places, above = [], torch.empty(0, 2), []
    decode = Decoder(model, world, state)
    for step in range(last + 1):
        if step % interval == 0 and step // interval < len(result.plans):
            plan = result.plans[step // interval]
            places = decode(_plan_path(plan, number))
            above = [decode(upper.path[number]) for upper in plan.above]
        now = state._replace(position=result.positions[number, step : step + 1])
        edge = SCALE * world.size
        picture = Image.fromarray(painted(world, now)[0])
        picture = picture.resize((edge, edge), Image.Resampling.NEAREST)
        ahead = torch.cat([now.position, places[step % interval :]])
        _line(picture, ahead, PLANNED, 2)
        _line(picture, result.positions[number, : step + 1], EXECUTED, 3)
        for level, goals in enumerate(above):
            _rings(picture, goals, LEVELS[level % len(LEVELS)], 4 + 3 * level)
        frames.append(picture)
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0, optimize=True
    )


def _rings(picture: Image.Image, places: Tensor, colour: str, radius: int) -> None:
    draw = ImageDraw.Draw(picture)
    for x, y in (SCALE * places).tolist():
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=2)


def _line(picture: Image.Image, places: Tensor, colour: str, width: int) -> None:
    points: Sequence[tuple[float, float]] = [(SCALE * x, SCALE * y) for x, y in places.tolist()]
    if len(points) > 1:
        ImageDraw.Draw(picture).line(points, fill=colour, width=width)
