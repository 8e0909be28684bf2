"""Draws docs/assets/architecture.svg from the imports: what each part stands on.

.venv/bin/python docs/draw_architecture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from tests.helpers import imports  # noqa: E402

OUT = ROOT / "docs" / "assets" / "architecture.svg"
PACKAGES = (
    ("the library: vicreg_kernels/", ROOT, "vicreg_kernels"),
    ("the trainer: python/vicreg_jepa/", ROOT / "python", "vicreg_jepa"),
)
WIDTH, HEIGHT = 1.0, 0.36


def room(name: str) -> str:
    """The folder or file below the package that a module is in."""
    return ".".join(name.split(".")[1:2])


def graph_of(root: Path, package: str) -> imports.Graph:
    found = imports.rooms(imports.modules(root, package), room)
    # The package's __init__ gives out what is public: it stands on all, and nothing is drawn by it.
    found.pop("", None)
    return {name: {other for other in imported if other} for name, imported in found.items()}


def places(graph: imports.Graph) -> dict[str, tuple[float, float]]:
    """Each room on its floor, side by side; neighbours on the floor below decide the order."""
    floors = imports.floors(graph)
    found: dict[str, tuple[float, float]] = {}
    for floor in range(max(floors.values()) + 1):
        names = sorted(name for name, at in floors.items() if at == floor)

        def wanted(name: str) -> float:
            below = [found[other][0] for other in graph[name] if other in found]
            return sum(below) / len(below) if below else 0.0

        names.sort(key=wanted)
        for i, name in enumerate(names):
            found[name] = ((i - (len(names) - 1) / 2) * 1.25, float(floor))
    return found


def draw(axes: Axes, title: str, graph: imports.Graph) -> None:
    at = places(graph)
    for name, imported in imports.without_shortcuts(graph).items():
        for other in imported:
            (x, y), (below_x, below_y) = at[name], at[other]
            axes.annotate(
                "",
                xy=(below_x, below_y + HEIGHT / 2),
                xytext=(x, y - HEIGHT / 2),
                arrowprops={"arrowstyle": "-|>", "color": "#888888", "lw": 0.9},
            )
    for name, (x, y) in at.items():
        box = {"boxstyle": "round,pad=0.35", "facecolor": "#e8eef7", "edgecolor": "#44618c"}
        axes.text(x, y, name, ha="center", va="center", fontsize=9, bbox=box)
    side = max(abs(x) for x, _ in at.values()) + WIDTH
    axes.set(xlim=(-side, side), ylim=(-0.6, max(y for _, y in at.values()) + 0.6), title=title)
    axes.axis("off")


def main() -> None:
    figure, both = plt.subplots(1, len(PACKAGES), figsize=(15, 8))
    for axes, (title, root, package) in zip(both, PACKAGES, strict=True):
        draw(axes, title, graph_of(root, package))
    figure.tight_layout()
    # Without the date and random identifiers, so that the same imports give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "architecture"
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure.savefig(OUT, metadata={"Date": None})
    print(OUT)


if __name__ == "__main__":
    main()
