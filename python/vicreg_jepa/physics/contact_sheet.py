"""Contact sheets: every property's quadruplet, some possible videos, and what is laid over them, as
rows of frames.

python -m vicreg_jepa.physics.contact_sheet --output runs/physics --seed 0
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vicreg_jepa.cli_options import draw_sheets
from vicreg_jepa.physics import unpredictable
from vicreg_jepa.physics.properties import PROPERTIES
from vicreg_jepa.physics.quadruplets import Quadruplet, quadruplet
from vicreg_jepa.physics.scene import FRAMES, SIZE
from vicreg_jepa.physics.videos import FAMILIES, Sample, possible

GAP = 3
LABEL = 175
POSSIBLE, IMPOSSIBLE = (40, 130, 70), (190, 45, 45)


def chosen(needed: set[int], columns: int) -> list[int]:
    """The frames to show: the required ones, and others in the widest gaps between them."""
    shown = sorted({0, FRAMES - 1} | needed)
    while len(shown) < columns:
        gaps = np.diff(shown).tolist()
        widest = gaps.index(max(gaps))
        shown.insert(widest + 1, (shown[widest] + shown[widest + 1]) // 2)
    return shown


def strip(video: NDArray[np.uint8], shown: list[int], rim: tuple[int, int, int]) -> Image.Image:
    """Some frames of a video [T, 64, 64, 3] side by side, underlined in a colour."""
    width = len(shown) * (SIZE + GAP) - GAP
    row = Image.new("RGB", (width, SIZE + 2), rim)
    row.paste("white", (0, 0, width, SIZE))
    for column, frame in enumerate(shown):
        row.paste(Image.fromarray(video[frame]), (column * (SIZE + GAP), 0))
    return row


def quadruplet_block(four: Quadruplet, columns: int, rows: tuple[int, ...]) -> Image.Image:
    """The rows of one quadruplet: labels on the left, and a line before the first frame that
    differs.
    """
    seen = four.first_difference
    shown = chosen({four.record["cut"] - 1, seen - 1, seen}, columns)
    width = LABEL + columns * (SIZE + GAP)
    block = Image.new("RGB", (width, 16 + len(rows) * (SIZE + GAP + 2)), "white")
    draw, font = ImageDraw.Draw(block), ImageFont.load_default(12)
    where = "behind a panel" if four.behind_occluder else "in view"
    draw.text((2, 0), f"{four.record['property']}, {where}", "black", font)
    at = LABEL + shown.index(seen) * (SIZE + GAP) - 2
    small = ImageFont.load_default(10)
    for column, frame in enumerate(shown):
        draw.text((LABEL + column * (SIZE + GAP) + 2, 2), str(frame), (120, 120, 120), small)
    for line, row in enumerate(rows):
        y = 16 + line * (SIZE + GAP + 2)
        rim = POSSIBLE if four.possible[row] else IMPOSSIBLE
        parts = (row % 2, row % 2 if row < 2 else 1 - row % 2)
        kind = "possible" if four.possible[row] else "impossible"
        draw.text((2, y + 14), kind, rim, font)
        draw.text((2, y + 32), f"past {'AB'[parts[0]]}, future {'AB'[parts[1]]}", "black", font)
        block.paste(strip(four.videos[row], shown, rim), (LABEL, y))
    draw.line([(at, 14), (at, block.height)], fill=(0, 0, 0), width=1)
    return block


def possible_block(sample: Sample, columns: int, kind: str = "possible: ") -> Image.Image:
    shown = np.linspace(0, FRAMES - 1, columns).round().astype(int).tolist()
    block = Image.new("RGB", (LABEL + columns * (SIZE + GAP), SIZE + GAP + 2), "white")
    draw, font = ImageDraw.Draw(block), ImageFont.load_default(12)
    draw.text((2, 22), f"{kind}{sample.record['family']}", POSSIBLE, font)
    block.paste(strip(sample.video, shown, POSSIBLE), (LABEL, 0))
    return block


def stacked(blocks: list[Image.Image], across: int) -> Image.Image:
    """Blocks in `across` columns, read from left to right."""
    lines = [blocks[start : start + across] for start in range(0, len(blocks), across)]
    width = max(sum(block.width + 12 for block in line) for line in lines)
    height = sum(max(block.height for block in line) + 8 for line in lines)
    sheet = Image.new("RGB", (width, height), "white")
    y = 4
    for line in lines:
        for number, block in enumerate(line):
            sheet.paste(block, (6 + number * (width // across), y))
        y += max(block.height for block in line) + 8
    return sheet


def quadruplet_sheet(
    seed: int, hidden: bool | None, columns: int, rows: tuple[int, ...] = (0, 1, 2, 3)
) -> Image.Image:
    """The quadruplet of the seed for every property."""
    quadruplets = [quadruplet(name, seed, hidden) for name in PROPERTIES]
    return stacked([quadruplet_block(one, columns, rows) for one in quadruplets], 2)


def overview(seed: int) -> Image.Image:
    """A small sheet: a possible and both exchanged videos of each property; half of them behind
    panels.
    """
    hidden = ("permanence", "gravity", "colour", "control")
    quadruplets = [quadruplet(name, seed, name in hidden) for name in PROPERTIES]
    return stacked([quadruplet_block(one, 9, (0, 2, 3)) for one in quadruplets], 2)


def possible_sheet(seed: int, columns: int, each: int) -> Image.Image:
    """The first `each` videos of every family, from `seed` on."""
    missing = dict.fromkeys((*FAMILIES, "staged"), each)
    samples: list[Sample] = []
    while any(missing.values()):
        sample = possible(seed)
        seed += 1
        if missing[sample.record["family"]]:
            missing[sample.record["family"]] -= 1
            samples.append(sample)
    samples.sort(key=lambda sample: sample.record["family"])
    return stacked([possible_block(sample, columns) for sample in samples], 2)


def noise_sheet(seed: int, columns: int) -> Image.Image:
    """One video under each layer of noise, under all at several strengths, and the quadruplet of a
    colour at strength 0.5.
    """
    sample = possible(seed)
    rows: list[tuple[str, float, tuple[str, ...] | None]]
    rows = [(f"{layer}, strength 1", 1.0, (layer,)) for layer in unpredictable.LAYERS]
    rows += [(f"all, strength {strength}", strength, None) for strength in (0.25, 0.5, 1.0)]
    blocks = []
    for label, strength, layers in rows:
        disturbance = unpredictable.Disturbance((0, seed), strength, layers)
        video = disturbance(sample.video, range(FRAMES))
        blocks.append(possible_block(Sample(video, {"family": label}), columns, "noise: "))
    return stacked(
        [*blocks, quadruplet_block(quadruplet("colour", seed, True, 0.5), columns, (0, 1, 2, 3))], 1
    )


def draw(seed: int, folder: Path) -> list[str]:
    """Writes an overview, the possible videos, all quadruplets in view and behind panels, and the
    layers of noise.
    """
    small = overview(seed).quantize(method=Image.Quantize.FASTOCTREE)
    small.save(folder / "overview.png", optimize=True)
    possible_sheet(seed, 11, 3).save(folder / "possible.png")
    quadruplet_sheet(seed, False, 11).save(folder / "in_view.png")
    quadruplet_sheet(seed, True, 11).save(folder / "behind_panels.png")
    noise_sheet(seed, 11).save(folder / "noise.png")
    return ["overview.png", "possible.png", "in_view.png", "behind_panels.png", "noise.png"]


def main(arguments: list[str] | None = None) -> None:
    draw_sheets(
        "vicreg_jepa.physics.contact_sheet",
        "Draw videos as rows of frames: an overview, possible ones, all quadruplets, noise.",
        "runs/physics",
        draw,
        arguments,
    )


if __name__ == "__main__":
    main()
