"""Trains VICReg on digits with the fused kernels and with the reference, and compares both."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import vicreg_kernels
from vicreg_jepa import config
from vicreg_jepa.compare.compare import NAMES, Compared, compare, with_kernels
from vicreg_jepa.compare.memory import in_own_exact_process, in_own_process, resident_peak
from vicreg_jepa.config import Config, ConfigError
from vicreg_jepa.data import sources
from vicreg_jepa.data.image_sets import Images
from vicreg_jepa.demo import figure, losses, table
from vicreg_jepa.evaluation import probe
from vicreg_jepa.evaluation.features import features
from vicreg_jepa.methods import build
from vicreg_jepa.training import checkpoint
from vicreg_jepa.training.run import load, restore, train
from vicreg_jepa.training.trainer import device_of
from vicreg_kernels.core import dispatch

# Parity is measured before the training and at the checkpoints.
SETTINGS = ("training.steps=200", "training.save_every=40", "training.keep=5")
FINAL_STEPS = 20
PER_CLASS = 10


def settings(output: Path, overrides: Sequence[str]) -> Config:
    chosen = config.load("vicreg_digits", config.layered(SETTINGS, overrides))
    if chosen.method != "vicreg":
        raise ConfigError(f"method: got {chosen.method!r}, the demo takes 'vicreg'")
    if chosen.kernels != "fused":
        raise ConfigError(f"kernels: got {chosen.kernels!r}, the demo trains with both")
    return chosen


def run(settings: Config, output: Path) -> None:
    start = time.perf_counter()
    results = measure(settings, output)
    results["seconds"] = time.perf_counter() - start
    picture = output / f"vicreg_{results['data']['name']}.png"
    figure.draw(results, picture)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table.render(results))
    print(f"{picture} and {output / 'results.json'} written, in {results['seconds']:.0f} s")


def measure(settings: Config, output: Path) -> dict[str, Any]:
    """Measure everything and return JSON values; the trained encoders are written to `output`."""
    about = _about(settings)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs = {name: Path(scratch, name) for name in NAMES}
        peak = {n: in_own_process(_train, with_kernels(settings, n), runs[n]) for n in NAMES}
        views = Path(scratch, "views.safetensors")
        parts: dict[str, Callable[[], Any]] = {
            "speed, parity, probe": partial(in_own_process, _side_by_side, settings, runs, views)
        }
        for name in NAMES:
            memory = partial(in_own_exact_process, losses.memory, settings, name, views)
            parts[f"memory, {name}"] = memory
        measured = []
        with tqdm(total=len(parts), desc="measuring", unit="part", ncols=100) as bar:
            for label, part in parts.items():
                bar.set_postfix_str(label)
                measured.append(part())
                bar.update()
        curves = {name: _curve(folder) for name, folder in runs.items()}
        for name, folder in runs.items():
            encoder = restore(folder)[1].encoder
            save_file(encoder.state_dict(), output / f"encoder_{name}.safetensors")
    both, *extra = measured
    step: Compared = both.pop("step")
    rates = {name: settings.training.batch / seconds for name, seconds in step.seconds.items()}
    return {
        **about,
        "throughput": {
            "rounds": losses.ROUNDS,
            "step": {"images_per_second": rates, "ratio": step.ratio},
            "loss": both.pop("loss"),
        },
        "memory": {
            "loss": dict(zip(NAMES, extra, strict=True)),
            "step": step.extra_bytes,
            "training": peak,
        },
        "training": _training(curves),
        **both,
    }


def _about(settings: Config) -> dict[str, Any]:
    device = device_of(settings)
    side = min(settings.training.batch, settings.model.expander[1])
    try:
        backend = dispatch.choose("vicreg", settings.backend, device.type, torch.float32, side)
    except RuntimeError as error:
        raise ConfigError(f"backend: {error}") from None
    train_set, test_set = sets_of(settings)
    where = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return {
        "settings": config.describe(settings),
        "environment": {
            "backend": backend,
            "device": where,
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "vicreg_kernels": vicreg_kernels.__version__,
        },
        "data": {
            "name": train_set.name,
            "train": len(train_set),
            "test": len(test_set),
            "shape": list(train_set.images.shape[1:]),
        },
    }


def sets_of(settings: Config) -> tuple[Images, Images]:
    """(training set, held-out set), both in memory."""
    train, test = (
        part
        if isinstance(part, Images)
        else Images(part.name, part[range(len(part))], part.labels, part.classes)
        for part in sources.images(settings)
    )
    return train, test


def _train(settings: Config, folder: Path) -> int:
    """Train; return the peak memory of this process in bytes."""
    train(settings, folder)
    device = torch.device(settings.training.device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()


def _curve(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _training(curves: dict[str, list[float]]) -> dict[str, Any]:
    apart = [abs(a - b) / abs(b) for a, b in zip(*(curves[n] for n in NAMES), strict=True)]
    steps = min(FINAL_STEPS, len(apart))
    return {
        "losses": curves,
        "final_steps": steps,
        "final_loss": {name: statistics.mean(curve[-steps:]) for name, curve in curves.items()},
        "curves_apart": {"largest": max(apart), "median": statistics.median(apart)},
    }


def _side_by_side(settings: Config, runs: dict[str, Path], views: Path) -> dict[str, Any]:
    """The measurements that need both losses in one process; writes the last embeddings to the file
    `views`.
    """
    sets = sets_of(settings)
    untrained = build.method(settings, sets[0].images.shape[1])
    checkpoints = [load(path) for path in checkpoint.existing(runs["fused"] / "checkpoints")]
    methods = [(untrained, 0), *((method, step) for _, method, step in checkpoints)]
    moments = [losses.embeddings(settings, method, step) for method, step in methods]
    losses.save(moments[-1], views)
    both = losses.of(settings)
    trained = {name: restore(folder)[1] for name, folder in runs.items()}
    return {
        "step": compare(settings, losses.ROUNDS),
        "loss": losses.throughput(both, moments[-1]),
        "parity": losses.apart(both, moments),
        "probe": _probe(settings, trained, probe.calibrated(untrained, sets[0].images), sets),
    }


def _probe(
    settings: Config, trained: dict[str, Any], untrained: Any, sets: tuple[Images, Images]
) -> dict[str, Any]:
    """Probe accuracy on the features of the trained and the untrained encoders, and on the
    pixels.
    """
    views: dict[str, Callable[[Tensor], Tensor]] = {
        name: partial(features, method)
        for name, method in {**trained, "untrained": untrained}.items()
    }
    views["pixels"] = lambda images: images.flatten(1)
    scores: dict[str, Any] = {"per_class": PER_CLASS}
    for name, see in views.items():
        train, test = (see(part.images) for part in sets)
        score = probe.probe(train, test, sets[0], sets[1], seed=settings.seed, per_class=PER_CLASS)
        scores[name] = asdict(score)
    return scores
