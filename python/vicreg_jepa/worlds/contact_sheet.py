"""A contact sheet: episodes of the worlds as rows of frames, with their paths.

python -m vicreg_jepa.worlds.contact_sheet --output runs/worlds --seed 0
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from vicreg_jepa.cli_options import draw_sheets
from vicreg_jepa.worlds.episodes import rollout
from vicreg_jepa.worlds.maze import Maze
from vicreg_jepa.worlds.pictures import painted
from vicreg_jepa.worlds.policies import POLICIES
from vicreg_jepa.worlds.two_rooms import TwoRooms
from vicreg_jepa.worlds.world import STEPS, State, World

SCALE = 2
GAP = 4
LABEL = 155
FRAMES = 7
INK, SHORTEST, WALKED = (0, 0, 0), (40, 110, 200), (206, 40, 40)
ROWS: tuple[tuple[str, World, str], ...] = (
    ("TwoRooms, fixed", TwoRooms(), "walk"),
    ("TwoRooms, fixed", TwoRooms(), "straight"),
    ("TwoRooms, random", TwoRooms(wall="random"), "expert"),
    ("TwoRooms, random", TwoRooms(wall="random"), "straight"),
    ("Maze, 5 cells", Maze(), "expert"),
    ("Maze, 5 cells", Maze(), "walk"),
)


def enlarged(picture: Image.Image, edge: int) -> Image.Image:
    return picture.resize((edge, edge), Image.Resampling.NEAREST)


def row(label: str, world: World, policy: str, seed: int, steps: int) -> Image.Image:
    """Frames of one episode, then a map with the shortest path and the path of the dot."""
    states, _ = rollout(world, POLICIES[policy], world.reset(torch.tensor([seed])), steps)
    reached = [bool(world.success(state)) for state in states]
    last = reached.index(True) if any(reached) else steps
    edge = SCALE * TwoRooms().size
    shown = torch.linspace(0, last, FRAMES).round().long().tolist()
    strip = Image.new("RGB", (LABEL + (FRAMES + 1) * (edge + GAP), edge + GAP), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(13)
    success = bool(world.success(states[-1]))
    lines = [label, policy, f"path {float(world.distance(states[0])):.0f} pixels"]
    lines.append(f"step {steps}: {'reached' if success else 'not reached'}")
    for number, line in enumerate(lines):
        draw.text((4, 30 + 17 * number), line, INK, font)
    for column, step in enumerate(shown):
        frame = Image.fromarray(painted(world, states[step])[0])
        strip.paste(enlarged(frame, edge), (LABEL + column * (edge + GAP), 0))
        draw.text((LABEL + column * (edge + GAP) + 8, edge - 22), str(step), INK, font)
    strip.paste(map_of(world, states, edge), (LABEL + FRAMES * (edge + GAP), 0))
    return strip


def map_of(world: World, states: list[State], edge: int) -> Image.Image:
    """The first frame with both paths on it."""
    picture = enlarged(Image.fromarray(painted(world, states[0])[0]), edge)
    scale = edge / world.size
    walked = [tuple(state.position[0].tolist()) for state in states]
    for way, colour in ((world.way(states[0])[0], SHORTEST), (walked, WALKED)):
        points = [(scale * x, scale * y) for x, y in way]
        ImageDraw.Draw(picture).line(points, fill=colour, width=2)
    return picture


def sheet(seed: int, steps: int = STEPS) -> Image.Image:
    rows = [row(*one, seed=seed + place, steps=steps) for place, one in enumerate(ROWS)]
    whole = Image.new("RGB", (rows[0].width, sum(one.height for one in rows)), "white")
    y = 0
    for one in rows:
        whole.paste(one, (0, y))
        y += one.height
    return whole


def draw(seed: int, folder: Path) -> list[str]:
    """Writes the sheet of a seed."""
    sheet(seed).quantize(64).save(folder / "worlds.png", optimize=True)
    return ["worlds.png"]


def main(arguments: list[str] | None = None) -> None:
    draw_sheets(
        "vicreg_jepa.worlds.contact_sheet",
        "Draw episodes of each world as rows of frames.",
        "runs/worlds",
        draw,
        arguments,
    )


if __name__ == "__main__":
    main()
