"""What the demo measures: runs of the same method that differ in the loss alone, side by side."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import vicreg_kernels
from jepa import parity, probe, timing
from jepa.data import Images
from jepa.memory import in_own_exact_process, in_own_process
from jepa.models import ConvEncoder
from jepa.runs import Outcome, Settings, loss_memory, make_repeatable, moments, train_run
from jepa.train import batches, progress
from jepa.vicreg import Loss, loss_named
from vicreg_kernels import dispatch

ROUNDS = 15
FINAL_STEPS = 20
PER_CLASS = 10


def backend_of(settings: Settings) -> str:
    """The backend that the fused loss runs on; raises where the asked one cannot."""
    device = torch.device(settings.device).type
    side = min(settings.batch, settings.dim)
    return dispatch.choose("vicreg", settings.backend, device, torch.float32, side)


def compare(settings: Settings, names: tuple[str, ...], output: Path) -> dict[str, Any]:
    """Everything the demo measures, for the losses called `names`, as JSON takes it."""
    start = time.perf_counter()
    backend = backend_of(settings)
    device = torch.device(settings.device)
    train_set, test_set = settings.sets()
    encoders = {name: output / f"encoder_{name}.pt" for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        outcomes: dict[str, Outcome] = {}
        for name in names:
            folder = Path(scratch, name)
            folder.mkdir()
            outcomes[name] = in_own_process(train_run, settings, name, encoders[name], folder)
        embeddings = moments(Path(scratch, names[0]))
        extra = _loss_memory(settings, names, embeddings[-1])
        measured = in_own_process(_side_by_side, settings, encoders, embeddings)
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "environment": {
            "backend": backend if "fused" in names else None,
            "device": _describe(device),
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
            "classes": len(train_set.classes),
        },
        "memory": {
            "counted": _counted(device),
            "loss_extra_bytes": extra,
            "training_extra_bytes": {name: o.extra_bytes for name, o in outcomes.items()},
            "training_peak_bytes": {name: o.peak_bytes for name, o in outcomes.items()},
        },
        "training": _training(outcomes),
        **measured,
    }
    results["seconds"] = time.perf_counter() - start
    return results


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _counted(device: torch.device) -> str:
    if device.type == "cuda":
        return "tensors on the GPU, each loss in a process of its own"
    return "resident, each loss in a process of its own"


def _loss_memory(settings: Settings, names: tuple[str, ...], embeddings: Path) -> dict[str, int]:
    extra = {}
    with progress(len(names), "memory of the loss", "loss") as bar:
        for name in names:
            extra[name] = in_own_exact_process(loss_memory, settings, name, embeddings)
            bar.update()
    return extra


def _side_by_side(
    settings: Settings, encoders: dict[str, Path], embeddings: list[Path]
) -> dict[str, Any]:
    """What takes every loss in one process: their throughput, their parity, their encoders."""
    make_repeatable()
    train_set, test_set = settings.sets()
    losses = {name: loss_named(name, settings.backend) for name in encoders}
    device = torch.device(settings.device)
    return {
        "throughput": _throughput(settings, losses, train_set, embeddings[-1]),
        "parity": _parity(losses, embeddings, device) if len(losses) == 2 else None,
        "probe": _probe(settings, encoders, train_set, test_set),
    }


def _throughput(
    settings: Settings, losses: dict[str, Loss], train_set: Images, embeddings: Path
) -> dict[str, Any]:
    """Training step and loss alone, each loss in turn."""
    device = torch.device(settings.device)
    batch = next(batches(train_set.images.to(device), settings.batch, settings.seed))

    def step(loss: Loss) -> Callable[[], object]:
        trainer = settings.trainer(loss, batch.shape[1])
        return lambda: trainer.step(batch)

    x, y = (z.requires_grad_() for z in torch.load(embeddings, map_location=device))

    def alone(loss: Loss) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(x, y), (x, y))

    measured: dict[str, Any] = {"rounds": ROUNDS}
    warmup = 3
    with progress(2 * (ROUNDS + warmup), "timing in turns", "round") as bar:
        for key, action in (("step", step), ("loss", alone)):
            seconds = timing.interleaved(
                {name: action(loss) for name, loss in losses.items()},
                device,
                rounds=ROUNDS,
                warmup=warmup,
                after_round=bar.update,
            )
            medians = {name: statistics.median(taken) for name, taken in seconds.items()}
            measured[key] = {
                "images_per_second": {name: settings.batch / m for name, m in medians.items()},
                "seconds": seconds,
            }
            if len(losses) == 2:
                ratio = timing.median_ratio(seconds["reference"], seconds["fused"])
                measured[key]["ratio"] = ratio
    return measured


def _parity(
    losses: dict[str, Loss], embeddings: list[Path], device: torch.device
) -> dict[str, Any]:
    found = []
    with progress(len(embeddings), "parity with float64", "moment") as bar:
        for path in embeddings:
            found.append(parity.compare(losses, *torch.load(path, map_location=device)))
            bar.update()
    return {
        "moments": len(found),
        "worst": asdict(parity.worst(found)),
        "each": [asdict(moment) for moment in found],
    }


def _training(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    steps = min(FINAL_STEPS, *(len(o.losses) for o in outcomes.values()))
    training: dict[str, Any] = {
        "losses": {name: o.losses for name, o in outcomes.items()},
        "seconds": {name: o.seconds for name, o in outcomes.items()},
        "final_steps": steps,
        "final_loss": {n: statistics.mean(o.losses[-steps:]) for n, o in outcomes.items()},
    }
    if len(outcomes) == 2:
        pairs = zip(outcomes["fused"].losses, outcomes["reference"].losses, strict=True)
        apart = [abs(fused - plain) / abs(plain) for fused, plain in pairs]
        training["curves_apart"] = {"largest": max(apart), "median": statistics.median(apart)}
    return training


def _probe(
    settings: Settings, encoders: dict[str, Path], train_set: Images, test_set: Images
) -> dict[str, Any]:
    """Each trained encoder's accuracy, the same network's before training, and the pixels'."""
    fresh = settings.method(loss_named("reference"), train_set.images.shape[1]).encoder
    untrained = probe.calibrated(fresh, train_set.images)
    accuracies: dict[str, Any] = {"per_class": PER_CLASS}
    with progress(len(encoders) + 2, "linear probe", "probe") as bar:

        def add(name: str, features: Callable[[torch.Tensor], torch.Tensor]) -> None:
            train, test = features(train_set.images), features(test_set.images)
            found = probe.probe(
                train, test, train_set, test_set, seed=settings.seed, per_class=PER_CLASS
            )
            accuracies[name] = asdict(found)
            bar.update()

        for name, path in encoders.items():
            trained = ConvEncoder(train_set.images.shape[1])
            trained.load_state_dict(torch.load(path, map_location="cpu"))
            add(name, partial(probe.features, trained))
        add("untrained", partial(probe.features, untrained))
        add("pixels", lambda images: images.flatten(1))
    return accuracies
