"""The picture of a comparison: both loss curves, and the throughput of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"fused": "#d1495b", "reference": "#30638e"}


def draw(results: dict[str, Any], path: Path) -> None:
    """results: as `comparison.compare` returns them; writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(results["training"]["losses"])
    columns = {"width_ratios": (2.2, 1, 1)}
    figure, axes = pyplot.subplots(
        1, 3, figsize=(12, 4.2), layout="constrained", gridspec_kw=columns
    )
    _curves(axes[0], results, names)
    _bars(axes[1], results["throughput"]["step"], names, "Training step")
    _bars(axes[2], results["throughput"]["loss"], names, "Loss alone, forward + backward")
    settings, data = results["settings"], results["data"]
    figure.suptitle(
        f"VICReg on {data['name']}: batch {settings['batch']}, embeddings of {settings['dim']}, "
        f"{results['environment']['device']}",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _curves(axis: Any, results: dict[str, Any], names: list[str]) -> None:
    # The reference is drawn broad beneath, so that a fused curve that covers it is seen to.
    styles = {"reference": {"linewidth": 5.0, "alpha": 0.45}, "fused": {"linewidth": 1.3}}
    for name in sorted(names, key="reference fused".index):
        losses = results["training"]["losses"][name]
        axis.plot(
            range(1, len(losses) + 1), losses, color=COLOURS[name], label=name, **styles[name]
        )
    apart = results["training"].get("curves_apart")
    title = (
        "Loss" if apart is None else f"Loss, curves at most {apart['largest']:.1e} apart (relative)"
    )
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("training step")
    axis.set_ylabel("VICReg loss (lower is better)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def _bars(axis: Any, measured: dict[str, Any], names: list[str], title: str) -> None:
    rates = [measured["images_per_second"][name] for name in names]
    bars = axis.bar(names, rates, color=[COLOURS[name] for name in names], width=0.62)
    axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=2, fontsize=10)
    axis.set_ylim(0, 1.15 * max(rates))
    ratio = measured.get("ratio")
    axis.set_title(
        title if ratio is None else f"{title}\nfused: {ratio:.1f}x the reference", fontsize=10
    )
    axis.set_ylabel("images/s (higher is better)")
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)
