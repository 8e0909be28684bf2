"""The table of a comparison, for a terminal of 100 columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

WIDTH = 100
LABEL, _UNIT, _BETTER, _VALUE = 44, 10, 8, 11
_MIB = 1 << 20


class _Rows:
    """Lines of label, unit, which way is better, one value a loss and a comparison."""

    def __init__(self, names: list[str]):
        self.names = names
        self.lines: list[str] = []

    def heading(self, text: str) -> None:
        self.lines.append(text)

    def add(
        self,
        label: str,
        unit: str,
        better: str,
        values: dict[str, float] | None,
        show: Callable[[float], str],
        compared: str = "",
    ) -> None:
        self.line(
            "  " + label,
            unit,
            better,
            [show(values[n]) if values else "" for n in self.names],
            compared,
        )

    def line(self, label: str, unit: str, better: str, cells: list[str], compared: str) -> None:
        middle = "".join(f"{cell:>{_VALUE}}" for cell in cells)
        rest = f"{compared:>{WIDTH - LABEL - _UNIT - _BETTER - 2 * _VALUE}}"
        self.lines.append(
            f"{label:<{LABEL}}{unit:<{_UNIT}}{better:<{_BETTER}}{middle}{rest}".rstrip()
        )


def render(results: dict[str, Any]) -> str:
    """results: as `comparison.compare` returns them."""
    names = list(results["training"]["losses"])
    both = len(names) == 2
    rows = _Rows(names)
    rule = "-" * WIDTH
    rows.lines += [*_head(results), rule]
    rows.line("", "unit", "better", names, "compared" if both else "")
    rows.lines.append(rule)
    _throughput(rows, results, both)
    _memory(rows, results, both)
    if both:
        _parity(rows, results["parity"])
    _training(rows, results, both)
    _probe(rows, results)
    rows.lines.append(rule)
    return "\n".join(rows.lines)


def _head(results: dict[str, Any]) -> list[str]:
    settings, data, where = results["settings"], results["data"], results["environment"]
    shape = " x ".join(str(edge) for edge in data["shape"])
    size = settings["batch"]
    lines = [
        f"VICReg on {data['name']}: {data['train']:,} training images of {shape}, "
        + f"{settings['steps']} steps of {size}, seed {settings['seed']}",
        f"embeddings {size} x {settings['dim']} float32, {where['device']}, torch {where['torch']}",
    ]
    if "fused" in results["training"]["losses"]:
        lines.append(f"fused:     vicreg_kernels.vicreg_loss, backend {where['backend']!r}")
    if "reference" in results["training"]["losses"]:
        lines.append(
            "reference: the published formula, eager PyTorch (D x D covariance, off-diagonal copy)"
        )
    return lines


def _throughput(rows: _Rows, results: dict[str, Any], both: bool) -> None:
    measured = results["throughput"]
    how = "in turns, " if both else ""
    rows.heading(f"THROUGHPUT ({how}median of {measured['rounds']})")
    for key, label in (("step", "training step"), ("loss", "loss alone, forward + backward")):
        ratio = _times(measured[key]["ratio"], "faster", "slower") if both else ""
        rate = measured[key]["images_per_second"]
        rows.add(label, "images/s", "higher", rate, lambda v: f"{v:,.0f}", ratio)


def _memory(rows: _Rows, results: dict[str, Any], both: bool) -> None:
    measured = results["memory"]
    rows.heading(f"PEAK MEMORY ({measured['counted']})")
    for key, label in (
        ("loss_extra_bytes", "loss alone, above its two inputs"),
        ("training_extra_bytes", "training, above the process at its start"),
        ("training_peak_bytes", "training, all of it"),
    ):
        values = measured[key]
        ratio = _times(_ratio(values), "less", "more") if both else ""
        rows.add(label, "MiB", "lower", values, lambda v: f"{v / _MIB:,.1f}", ratio)


def _ratio(values: dict[str, float]) -> float:
    return values["reference"] / values["fused"] if values["fused"] > 0 else math.inf


def _times(ratio: float, better: str, worse: str) -> str:
    """How many times better the fused loss is: of a gain its inverse reads as a loss."""
    if ratio in (0.0, math.inf):  # one of the two was too small to be seen
        return ""
    return f"{ratio:.1f}x {better}" if ratio >= 1 else f"{1 / ratio:.1f}x {worse}"


def _parity(rows: _Rows, parity: dict[str, Any]) -> None:
    rows.heading(f"PARITY (same embeddings, worst of {parity['moments']} moments of the training)")

    def small(value: float) -> str:
        return f"{value:.1e}"

    worst = parity["worst"]
    rows.add(
        "loss, fused against reference",
        "relative",
        "lower",
        None,
        small,
        small(worst["loss_between"]),
    )
    rows.add("loss, error from float64", "relative", "lower", worst["loss_truth"], small)
    rows.add(
        "gradient, fused against reference",
        "of max",
        "lower",
        None,
        small,
        small(worst["gradient_between"]),
    )
    rows.add("gradient, error from float64", "of max", "lower", worst["gradient_truth"], small)


def _training(rows: _Rows, results: dict[str, Any], both: bool) -> None:
    training = results["training"]
    rows.heading("TRAINING (same seed)")
    final = training["final_loss"]
    rows.add(
        f"loss, mean of the last {training['final_steps']} steps",
        "",
        "lower",
        final,
        lambda v: f"{v:.4f}",
    )
    if both:
        apart = training["curves_apart"]
        rows.add(
            "loss curves, largest difference at a step",
            "relative",
            "lower",
            None,
            str,
            f"{apart['largest']:.1e}",
        )


def _probe(rows: _Rows, results: dict[str, Any]) -> None:
    probe = results["probe"]
    held_out = results["data"]["test"]
    share = f"{held_out} held-out images, of which one is {100 / held_out:.1f} %"
    rows.heading(f"LINEAR PROBE (frozen features, {share})")
    few = f"{probe['per_class']} labels a class"
    for key, labels in (
        ("few_labels", few),
        ("all_labels", f"all {results['data']['train']:,} labels"),
    ):
        rows.add(
            f"trained encoder, {labels}",
            "%",
            "higher",
            {n: probe[n][key] for n in rows.names},
            _percent,
        )
        for baseline, label in (("untrained", "untrained encoder"), ("pixels", "raw pixels")):
            shared = {n: probe[baseline][key] for n in rows.names}
            rows.add(f"  {label}, {labels}", "%", "higher", shared, _percent)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
