"""The chart of one record: each contender's time as a multiple of ours, on a log axis."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bench import parity_table

# By the contender's place in the record, ours on other backends last: the Okabe-Ito palette and two
# of Paul Tol's, told apart by shape as well.
MARKS = (
    ("#D55E00", "o"),
    ("#0072B2", "s"),
    ("#56B4E9", "D"),
    ("#999999", "X"),
    ("#009E73", "P"),
    ("#E69F00", "^"),
    ("#CC79A7", "v"),
    ("#000000", "h"),
    ("#44AA99", "<"),
    ("#882255", ">"),
)


def draw(record: dict[str, Any], path: Path, dtype: str | None = None) -> None:
    """Its first run, in dtype (default: that of the run's first row); a line a case.

    Raises ValueError where there is nothing to draw.
    """
    if record["schema"] == parity_table.SCHEMA:
        raise ValueError("--figure draws times, this is a record of errors by precision")
    if not record["runs"] or not record["runs"][0]["rows"]:
        raise ValueError(f"--figure: the first run of this record of {record['op']} has no rows")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    run = record["runs"][0]
    dtype = dtype or run["rows"][0]["dtype"]
    rows = [row for row in run["rows"] if row["dtype"] == dtype]
    if not any(row["contender"] == "ours" for row in rows):
        raise ValueError(f"--figure: no row of ours in {dtype}, against which the others are drawn")
    ours = {row["case"]: row for row in rows if row["contender"] == "ours"}
    ratios = {
        case: [row["ratio"] for row in rows if row["case"] == case and row["ratio"]]
        for case in ours
    }
    # The largest gain at the top.
    cases = sorted(ours, key=lambda case: max(ratios[case], default=0.0))
    height = {case: index for index, case in enumerate(cases)}
    figure, axes = plt.subplots(figsize=(8.6, 1.7 + 0.5 * len(cases)), layout="constrained")
    for case, seen in ratios.items():
        ends = [min(1.0, *seen), max(1.0, *seen)] if seen else [1.0, 1.0]
        axes.plot(ends, [height[case]] * 2, color="#dddddd", lw=2, zorder=1)
    contenders = sorted(record["contenders"].items(), key=lambda item: item[0].startswith("ours_"))
    for index, (name, label) in enumerate(contenders):
        colour, marker = MARKS[index % len(MARKS)]
        points = [
            (row["ratio"], height[row["case"]])
            for row in rows
            if row["contender"] == name and row["ratio"] and row["case"] in height
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(
                # matplotlib leaves a label that begins with an underscore out of the legend
                x, y, s=52, color=colour, marker=marker, label=f" {label}", edgecolors="white",
                linewidths=0.7, zorder=3,
            )  # fmt: skip
    axes.axvline(1.0, color="black", lw=1, zorder=2)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    subs = (1, 2, 5) if high > 10 * low else (1, 1.2, 1.5, 2, 3, 4, 6, 8)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=50))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_yticks(range(len(cases)))
    axes.set_yticklabels(
        [
            # a case of sizes alone reads better with room between them
            re.sub(r"(?<=\d)x(?=\d)", " x ", case) + f"\nours {ours[case]['ms']['p50']:.3g} ms"
            for case in cases
        ],
        fontsize=9,
    )
    axes.set_ylim(-0.6, len(cases) - 0.4)
    axes.grid(axis="x", color="#eeeeee", zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("time of each alternative over this library's (ours, the line at 1x)")
    device, versions = run["device"]["name"], run["versions"]
    axes.set_title(f"{record['title']}\n", loc="left", fontsize=11)
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
