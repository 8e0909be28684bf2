"""The table of a comparison, for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vicreg_jepa.compare.compare import NAMES

WIDTH = 100
LABEL, _UNIT, _BETTER, _VALUE = 44, 10, 8, 11
_REST = WIDTH - LABEL - _UNIT - _BETTER - 2 * _VALUE


def render(results: dict[str, Any]) -> str:
    """results: as `digits.measure` returns them."""
    rule = "-" * WIDTH
    return "\n".join(
        [
            *_head(results),
            rule,
            _line("", "unit", "better", NAMES, "compared"),
            rule,
            *_throughput(results["throughput"]),
            *_memory(results),
            *_parity(results["parity"]),
            *_training(results["training"]),
            *_probe(results["probe"], results["data"]),
            rule,
        ]
    )


def _line(label: str, unit: str, better: str, cells: Any, compared: str) -> str:
    middle = "".join(f"{cell:>{_VALUE}}" for cell in cells)
    line = f"{label:<{LABEL}}{unit:<{_UNIT}}{better:<{_BETTER}}{middle}{compared:>{_REST}}"
    return line.rstrip()


def _row(
    label: str,
    unit: str,
    better: str,
    values: Mapping[str, float] | None,
    show: Callable[[float], str],
    compared: str = "",
) -> str:
    cells = [show(values[name]) if values else "" for name in NAMES]
    return _line("  " + label, unit, better, cells, compared)


def _head(results: dict[str, Any]) -> list[str]:
    settings, data, where = results["settings"], results["data"], results["environment"]
    training, shape = settings["training"], " x ".join(map(str, data["shape"]))
    return [
        f"VICReg on {data['name']}: {data['train']:,} training images of {shape}, "
        f"{training['steps']} steps of {training['batch']}, seed {settings['seed']}",
        f"embeddings {training['batch']} x {settings['model']['expander'][1]} float32, "
        f"{where['device']}, torch {where['torch']}",
        f"fused:     vicreg_kernels.vicreg_loss, backend {where['backend']!r}",
        "reference: the published formula, eager PyTorch (D x D covariance, off-diagonal copy)",
    ]


def _throughput(measured: dict[str, Any]) -> list[str]:
    lines = [f"THROUGHPUT (in turns, median of {measured['rounds']})"]
    for key, label in (("step", "training step"), ("loss", "loss alone, forward + backward")):
        rates, ratio = measured[key]["images_per_second"], measured[key]["ratio"]
        better = _times(ratio, "faster", "slower")
        lines.append(_row(label, "images/s", "higher", rates, lambda v: f"{v:,.0f}", better))
    return lines


def _memory(results: dict[str, Any]) -> list[str]:
    cpu = results["settings"]["training"]["device"] == "cpu"
    counted = "resident" if cpu else "tensors on the GPU"
    lines = [f"PEAK MEMORY ({counted}, each in a separate process)"]
    for key, label in (
        ("loss", "loss alone, above its two inputs"),
        ("step", "training step, above the memory before it"),
        ("training", "training, all of it"),
    ):
        values = results["memory"][key]
        lines.append(
            _row(label, "MiB", "lower", values, lambda v: f"{v / 2**20:,.1f}", less(values))
        )
    return lines


def less(values: Mapping[str, float]) -> str:
    if 0 in values.values():  # too small to be seen
        return ""
    return _times(values["reference"] / values["fused"], "less", "more")


def _times(ratio: float, better: str, worse: str) -> str:
    """How many times better the fused loss is; if it is worse, the inverse and the word for
    worse.
    """
    times = f"{max(ratio, 1 / ratio):.1f}x"
    return times if times == "1.0x" else f"{times} {better if ratio > 1 else worse}"


def _parity(parity: dict[str, Any]) -> list[str]:
    lines = [f"PARITY (same embeddings, worst of {parity['moments']} moments of the training)"]
    for key, unit in (("loss", "relative"), ("gradient", "of max")):
        between = f"{parity['worst'][f'{key}_between']:.1e}"
        truth = parity["worst"][f"{key}_truth"]
        lines.append(_row(f"{key}, fused against reference", unit, "lower", None, str, between))
        lines.append(_row(f"{key}, error from float64", unit, "lower", truth, "{:.1e}".format))
    return lines


def _training(training: dict[str, Any]) -> list[str]:
    final = f"loss, mean of the last {training['final_steps']} steps"
    apart = training["curves_apart"]
    curves = "loss curves, largest difference at a step"
    return [
        "TRAINING (same seed)",
        _row(final, "", "lower", training["final_loss"], "{:.4f}".format),
        _row(curves, "relative", "lower", None, str, f"{apart['largest']:.1e}"),
    ]


def _probe(accuracy: dict[str, Any], data: dict[str, Any]) -> list[str]:
    held_out = data["test"]
    share = f"{held_out} held-out images, of which one is {100 / held_out:.1f} %"
    lines = [f"LINEAR PROBE (frozen features, {share})"]
    for key, labels in (
        ("few_labels", f"{accuracy['per_class']} labels a class"),
        ("all_labels", f"all {data['train']:,} labels"),
    ):
        for encoder, label in (
            (None, "trained encoder"),
            ("untrained", "  untrained encoder"),
            ("pixels", "  raw pixels"),
        ):
            scores = {name: 100 * accuracy[encoder or name][key] for name in NAMES}
            lines.append(_row(f"{label}, {labels}", "%", "higher", scores, "{:.1f}".format))
    return lines
