"""The picture of a comparison: both loss curves, and the throughput of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vicreg_jepa.compare.compare import NAMES

COLOURS = {"fused": "#d1495b", "reference": "#30638e"}
# The reference is a broad line beneath, so it stays visible where the fused curve covers it.
STYLES = {"reference": {"linewidth": 5.0, "alpha": 0.45}, "fused": {"linewidth": 1.3}}


def draw(results: dict[str, Any], path: Path) -> None:
    """results: as `digits.measure` returns them; writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = {"width_ratios": (2.2, 1, 1)}
    figure, axes = pyplot.subplots(
        1, 3, figsize=(12, 4.2), layout="constrained", gridspec_kw=columns
    )
    _curves(axes[0], results["training"])
    _bars(axes[1], results["throughput"]["step"], "Training step")
    _bars(axes[2], results["throughput"]["loss"], "Loss alone, forward + backward")
    settings = results["settings"]
    batch, width = settings["training"]["batch"], settings["model"]["expander"][1]
    figure.suptitle(
        f"VICReg on {results['data']['name']}: batch {batch}, embeddings of {width}, "
        f"{results['environment']['device']}",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _curves(axis: Any, training: dict[str, Any]) -> None:
    for name, style in STYLES.items():
        losses = training["losses"][name]
        axis.plot(range(1, len(losses) + 1), losses, color=COLOURS[name], label=name, **style)
    apart = training["curves_apart"]["largest"]
    axis.set_title(f"Loss, curves at most {apart:.1e} apart (relative)", fontsize=10)
    axis.set_xlabel("training step")
    axis.set_ylabel("VICReg loss (lower is better)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def _bars(axis: Any, measured: dict[str, Any], title: str) -> None:
    rates = [measured["images_per_second"][name] for name in NAMES]
    bars = axis.bar(NAMES, rates, color=[COLOURS[name] for name in NAMES], width=0.62)
    axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=2, fontsize=10)
    axis.set_ylim(0, 1.15 * max(rates))
    axis.set_title(f"{title}\nfused: {measured['ratio']:.1f}x the reference", fontsize=10)
    axis.set_ylabel("images/s (higher is better)")
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)
