"""A picture of one episode: what the first visit remembered, and the way back to the goal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicreg_jepa.recall.visits import Visit
from vicreg_jepa.worlds.pictures import mixed
from vicreg_jepa.worlds.window import MazeWindow
from vicreg_jepa.worlds.world import State

REMEMBERED, WALKED, ALONE, DARK = "#2868c8", "#ce2828", "#e08a1e", 0.45


def chosen(world: MazeWindow, starts: State, found: Visit) -> int:
    """The episode whose shortest way is the longest of those that reached the goal."""
    length = torch.where(found.success, world.distance(starts), -1.0)
    return int(length.argmax())


def seen(world: MazeWindow, positions: Tensor) -> Tensor:
    """bool [3 * size, 3 * size]: the pixels that were in a window at positions [T, 2]."""
    edge, reach = world.maze.size, world.size // 2
    line = torch.arange(edge)
    middle = positions.floor().long()
    near = (line - middle[:, :, None]).abs() <= reach  # [T, 2, edge]
    return (near[:, 1, :, None] & near[:, 0, None, :]).any(dim=0)


def draw(
    world: MazeWindow, starts: State, first: Visit, found: Visit, alone: Visit, path: Path
) -> None:
    """Four panels: the places that the first visit remembered; the visit that recalls them; the
    same start with the last frames alone; what is seen at the start, and the picture of the goal.
    What was never in view in a visit is dark. Writes a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    number = chosen(world, starts, found)
    state = starts.rows(slice(number, number + 1))
    figure, axes = pyplot.subplots(
        1,
        4,
        figsize=(14.5, 4.6),
        layout="constrained",
        gridspec_kw={"width_ratios": (1, 1, 1, 0.5)},
    )
    begin = world.reset(state.seed).position[0]
    panels: tuple[tuple[Visit, str, str, Any], ...] = (
        (first, REMEMBERED, "the first visit, which ends its process", begin),
        (found, WALKED, "the next process, with memory", state.position[0]),
        (alone, ALONE, "the last frames alone", state.position[0]),
    )
    for axis, (visit, colour, words, start) in zip(axes, panels, strict=False):
        positions = visit.positions[number]
        picture = mixed(world.map(state._replace(position=start[None])))[0] / 255.0
        picture[~seen(world, positions).numpy()] *= DARK
        axis.imshow(picture, extent=(0, world.maze.size, world.maze.size, 0))
        axis.plot(*positions.T, color=colour, linewidth=1.4)
        if visit is first:
            axis.plot(*positions.T, ".", color=colour, markersize=2.5)
        else:
            axis.plot(*state.goal[0], "*", color="#28964a", markersize=13)
            axis.plot(*positions[-1], "o", color=colour, markersize=5)
        axis.plot(*start, "s", color="black", markersize=5)
        axis.set_title(words + _ending(visit, number, visit is first), fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[3].set_axis_off()
    for place, (words, at) in enumerate(
        (("seen at the start", state.position), ("the picture of the goal", state.goal))
    ):
        inset = axes[3].inset_axes((0.0, 0.53 - 0.53 * place, 1.0, 0.45))
        inset.imshow(mixed(world.render(state._replace(position=at)))[0])
        inset.set_title(words, fontsize=8)
        inset.set_xticks([])
        inset.set_yticks([])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _ending(visit: Visit, number: int, explores: bool) -> str:
    if explores:
        cells = int(visit.explored[number].sum())
        return f":\n{cells} cells in {int(visit.steps[number])} steps"
    reached = "at the goal" if visit.success[number] else "not at the goal"
    return f":\n{reached} after {int(visit.steps[number])} steps"
