"""The table and the figure of the comparison in filter.py, from the cells that were measured."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from vicreg_jepa.surprise.arms import ARMS, BROKEN, NOISES, STRENGTHS

COLOURS = {
    "teacher": "#30638e",
    "vicreg": "#2a9d8f",
    "sigreg": "#8ab17d",
    "pixels": "#d1495b",
    "blur": "#edae49",
}
FACTS = ("position", "velocity", "colour", "shape")
NONE = "-"  # not measured

# (arm, strength) -> the measured cells, one a seed
Cells = dict[tuple[str, float], list[dict[str, Any]]]


def read(root: Path) -> Cells:
    cells: Cells = defaultdict(list)
    for path in sorted(root.glob("*/filter.json")):
        cell = json.loads(path.read_text())
        cells[cell["arm"], cell["strength"]].append(cell)
    return dict(cells)


def accuracies(
    cell: dict[str, Any], what: str = "accuracy", model: str = "surprise"
) -> list[float]:
    """Of every property and place, without the control, in per cent."""
    return [100 * row[name][what] for row in cell[model].values() for name in BROKEN]


def average(values: list[float]) -> float:
    return sum(values) / len(values)


def table(cells: Cells) -> str:
    """A row for each arm and strength: relative accuracy (average over properties and places, the
    lowest of them, hidden exchanges alone, the untrained network), AUROC, and the probes; means
    over seeds. A dash is a cell that was not measured.
    """
    names = ("accuracy", "least", "hidden", "untrained", "AUROC", "control", *FACTS, *NOISES)
    lines = [f"{'arm':<9}{'strength':>9}{'seeds':>6}" + "".join(f"{n:>10}" for n in names)]
    strengths = sorted({*STRENGTHS, *(strength for _, strength in cells)})
    for arm in ARMS:
        for strength in strengths:
            some = cells.get((arm, strength), [])
            values = [_columns(cell) for cell in some]
            shown = [
                f"{average([v[n] for v in values]):.1f}" if values and n in values[0] else NONE
                for n in names
            ]
            row = "".join(f"{text:>10}" for text in shown)
            lines.append(f"{arm:<9}{strength:>9g}{len(some):>6}{row}")
    return "\n".join(lines)


def _columns(cell: dict[str, Any]) -> dict[str, float]:
    hidden = [100 * cell["surprise"]["behind a panel"][name]["accuracy"] for name in BROKEN]
    control = [100 * row["control"]["accuracy"] for row in cell["surprise"].values()]
    return {
        "accuracy": average(accuracies(cell)),
        "least": min(accuracies(cell)),
        "hidden": average(hidden),
        "untrained": average(accuracies(cell, model="untrained")),
        "AUROC": average(accuracies(cell, "auroc")),
        "control": average(control),
        **{name: 100 * score for name, score in cell["probes"]["model"].items()},
    }


def figure(cells: Cells, path: Path) -> None:
    """Relative accuracy against strength, and what each arm's tokens hold at the strongest noise
    that was measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for arm in ARMS:
        points = sorted((s, some) for (name, s), some in cells.items() if name == arm)
        if points:
            heights = [average([_columns(cell)["accuracy"] for cell in some]) for _, some in points]
            left.plot([s for s, _ in points], heights, "o-", color=COLOURS[arm], label=arm)
            for strength, some in points:
                each = [_columns(cell)["accuracy"] for cell in some]
                left.plot([strength] * len(each), each, ".", color=COLOURS[arm], alpha=0.5)
    left.axhline(50, color="#888888", linestyle="--", linewidth=1)
    left.set_xlabel("strength of the noise")
    left.set_ylabel("quadruplets told apart, %")
    left.set_xlim(-0.05, 1.05)
    left.set_ylim(30, 102)
    left.legend(frameon=False)
    facts = (*FACTS, *NOISES)
    noisy = sorted({strength for _, strength in cells if strength > 0})
    shown = [arm for arm in ARMS if noisy and (arm, noisy[-1]) in cells]
    for number, arm in enumerate(shown):
        columns = [_columns(cell) for cell in cells[arm, noisy[-1]]]
        heights = [average([max(c.get(fact, 0), 0) for c in columns]) for fact in facts]
        places = [i + 0.8 * (number - (len(shown) - 1) / 2) / len(shown) for i in range(len(facts))]
        right.bar(places, heights, 0.8 / len(shown), color=COLOURS[arm], label=arm)
    right.set_xticks(range(len(facts)), facts, rotation=35, ha="right")
    right.set_ylabel("read from the tokens: R$^2$ or share right, %")
    if noisy:
        right.set_title(f"strength {noisy[-1]:g}", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)


def write(root: Path) -> str:
    """Write filter.txt and filter.png into the folder; return the table."""
    cells = read(root)
    text = table(cells)
    (root / "filter.txt").write_text(text + "\n")
    figure(cells, root / "filter.png")
    return text
