"""The chart of one run: each baseline's time as a multiple of the fused op's, on a log axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Contender -> legend, colour (the Okabe-Ito palette), marker.
SERIES = {
    "metric_learning": ("pytorch-metric-learning", "#CC79A7", "v"),
    "lightly": ("lightly", "#E69F00", "^"),
    "eager": ("published formula, eager", "#D55E00", "o"),
    "compiled": ("published formula, torch.compile", "#0072B2", "s"),
    "gram_plain": ("Gram trick, plain PyTorch", "#56B4E9", "D"),
    "gram_best": ("Gram trick, best plain PyTorch", "#009E73", "P"),
}


def draw(run: dict[str, Any], path: Path, dtype: str = "float32") -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in run["rows"] if row["dtype"] == dtype]
    ours = {row["shape"]: row for row in rows if row["contender"] == "ours"}
    gain = {row["shape"]: row["ratio"] for row in rows if row["contender"] == "eager"}
    # The largest gain over the published formula at the top.
    shapes = sorted(ours, key=lambda shape: gain.get(shape) or 0.0)
    height = {shape: index for index, shape in enumerate(shapes)}
    figure, axes = plt.subplots(figsize=(8.6, 1.6 + 0.5 * len(shapes)), layout="constrained")
    for shape in shapes:
        seen = [r["ratio"] for r in rows if r["shape"] == shape and r["ratio"]]
        axes.plot(
            [min(1.0, *seen), max(1.0, *seen)], [height[shape]] * 2, color="#dddddd", lw=2, zorder=1
        )
    for name, (label, colour, marker) in SERIES.items():
        points = [
            (row["ratio"], height[row["shape"]])
            for row in rows
            if row["contender"] == name and row["ratio"] and row["shape"] in height
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(
                x, y, s=52, color=colour, marker=marker, label=label, edgecolors="white",
                linewidths=0.7, zorder=3,
            )  # fmt: skip
    axes.axvline(1.0, color="black", lw=1, zorder=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(range(len(shapes)))
    axes.set_yticklabels(
        [
            f"{shape.replace('x', ' x ')}\nfused {ours[shape]['ms']['p50']:.3g} ms"
            for shape in shapes
        ],
        fontsize=9,
    )
    axes.set_ylim(-0.6, len(shapes) - 0.4)
    axes.grid(axis="x", which="major", color="#eeeeee", zorder=0)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("time of each alternative over the fused op's (1x, black line); right: slower")
    device, versions = run["device"]["name"], run["versions"]
    axes.set_title(
        "VICReg loss, forward and backward, by batch x dimensions\n", loc="left", fontsize=11
    )
    axes.text(
        0.0,
        1.015,
        f"{device}, {run['threads']} threads, {dtype}, torch {versions['torch']}",
        transform=axes.transAxes,
        fontsize=8.5,
        color="#555555",
    )
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)
