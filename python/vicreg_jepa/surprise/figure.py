"""A video's frames above its curve of surprise: a PNG, and a GIF in which a line moves with
time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vicreg_jepa.surprise.curves import Curve

COLOURS = {
    "same past": "#30638e",
    "impossible": "#d1495b",
    "exchanged": "#d1495b",
    "same future": "#8d99ae",
    "video": "#d1495b",
}


def _axes(rows: int, frames: int, curves: dict[str, Curve]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 1.0 * rows + 2.9), layout="constrained")
    grid = figure.add_gridspec(rows + 1, 1, height_ratios=[1] * rows + [2.6])
    below = figure.add_subplot(grid[rows])
    for name, curve in curves.items():
        values = curve.over_time.numpy()
        below.plot(range(len(values)), values, color=COLOURS[name], label=name, linewidth=2)
    below.set_xlim(-0.5, frames - 0.5)
    below.set_xlabel("frame")
    below.set_ylabel("surprise: L1 to the prediction")
    below.grid(alpha=0.25)
    below.spines[["top", "right"]].set_visible(False)
    return figure, grid, below


def picture(
    videos: dict[str, Tensor], curves: dict[str, Curve], path: Path, title: str, moment: int | None
) -> None:
    """videos: name -> uint8 [F, H, W, 3], each drawn as a strip of frames; moment: the first frame
    at which they differ.
    """
    from matplotlib import pyplot

    frames = next(iter(videos.values())).shape[0]
    shown = range(0, frames, 2)
    figure, grid, below = _axes(len(videos), frames, curves)
    for row, (name, video) in enumerate(videos.items()):
        axis = figure.add_subplot(grid[row])
        edge = video.shape[1]
        strip = np.full((edge, len(shown) * (edge + 2), 3), 255, dtype=np.uint8)
        for i, frame in enumerate(shown):
            strip[:, i * (edge + 2) : i * (edge + 2) + edge] = video[frame].numpy()
        # Frame f is drawn above f on the axis of the curve.
        axis.imshow(strip, extent=(-1, frames - 1, 0, 1), aspect="auto")
        axis.set_xlim(-0.5, frames - 0.5)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(name, color=COLOURS[name], fontsize=10)
        axis.spines[:].set_visible(False)
    if moment is not None:
        below.axvline(moment, color="#444444", linestyle="--", linewidth=1)
        below.annotate(" they part here", (moment, below.get_ylim()[1]), fontsize=9, va="top")
    below.legend(frameon=False, loc="upper left")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def animation(videos: dict[str, Tensor], curves: dict[str, Curve], path: Path) -> None:
    """The videos side by side, the curve growing below: a GIF of 8 frames a second."""
    from PIL import Image, ImageDraw

    scale, gap, height = 4, 8, 90
    edge = next(iter(videos.values())).shape[1] * scale
    width = len(videos) * (edge + gap) - gap
    whole = np.concatenate([c.over_time.numpy() for c in curves.values()])
    low, high = float(np.nanmin(whole)), float(np.nanmax(whole))
    frames = next(iter(videos.values())).shape[0]

    def point(index: int, value: float) -> tuple[float, float]:
        share = (value - low) / max(high - low, 1e-9)
        return index / (frames - 1) * (width - 8) + 4, edge + gap + (1 - share) * (height - 8) + 4

    pictures = []
    for frame in range(frames):
        canvas = Image.new("RGB", (width, edge + gap + height), "white")
        for i, video in enumerate(videos.values()):
            one = Image.fromarray(video[frame].numpy()).resize(
                (edge, edge), Image.Resampling.NEAREST
            )
            canvas.paste(one, (i * (edge + gap), 0))
        draw = ImageDraw.Draw(canvas)
        for i, name in enumerate(videos):
            draw.text((i * (edge + gap) + 6, 6), name, fill=COLOURS[name], font_size=16)
        for name, curve in curves.items():
            values = curve.over_time.numpy()[: frame + 1]
            points = [point(i, v) for i, v in enumerate(values) if np.isfinite(v)]
            if len(points) > 1:
                draw.line(points, fill=COLOURS[name], width=3)
        pictures.append(canvas)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=125, loop=0)
