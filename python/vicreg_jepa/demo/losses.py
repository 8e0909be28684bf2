"""Compares both losses on the embeddings of a real training: difference, speed and memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vicreg_jepa.compare import timing
from vicreg_jepa.compare.compare import NAMES, with_kernels
from vicreg_jepa.compare.memory import PeakMemory
from vicreg_jepa.config import Config
from vicreg_jepa.data import sources
from vicreg_jepa.demo import parity
from vicreg_jepa.distributed.ranks import Share
from vicreg_jepa.methods import build

ROUNDS = 15
Views = tuple[Tensor, Tensor]


def of(settings: Config) -> dict[str, parity.Loss]:
    """The method's loss with the fused kernels and with the reference."""
    return {n: build.method(with_kernels(settings, n), channels=1).loss for n in NAMES}


@torch.no_grad()
def embeddings(settings: Config, method: Any, step: int) -> Views:
    """[N, D] of both views of the batch of `step`, as in training."""
    device = settings.training.device
    batch = next(sources.source(settings).batches(step, Share()))
    method.to(device).train()
    x, y = method.views(batch.to(device), torch.Generator().manual_seed(step))
    return method(x), method(y)


def apart(losses: Mapping[str, parity.Loss], moments: list[Views]) -> dict[str, Any]:
    each = [parity.compare(losses, x, y) for x, y in moments]
    return {
        "moments": len(each),
        "worst": asdict(parity.worst(each)),
        "each": [asdict(moment) for moment in each],
    }


def throughput(losses: Mapping[str, parity.Loss], views: Views) -> dict[str, Any]:
    """Time the loss and its gradient with respect to both embeddings, alternating both kinds."""
    x, y = (z.detach().requires_grad_() for z in views)
    actions = {
        name: lambda loss=loss: torch.autograd.grad(loss(x, y), (x, y))
        for name, loss in losses.items()
    }
    seconds = timing.interleaved(actions, x.device, rounds=ROUNDS, warmup=3)
    return {
        "images_per_second": {n: len(x) / statistics.median(s) for n, s in seconds.items()},
        "ratio": timing.median_ratio(seconds["reference"], seconds["fused"]),
        "seconds": seconds,
    }


def save(views: Views, path: Path) -> None:
    save_file(dict(zip("xy", views, strict=True)), path)


def memory(settings: Config, name: str, path: Path) -> int:
    """The peak memory in bytes of one loss, forward and backward, above its two inputs."""
    loss, device = of(settings)[name], torch.device(settings.training.device)
    # Memory that a process keeps from its first product and backward does not belong to the loss.
    for rows, dim in ((8, 16), (16, 8)):
        small = [torch.randn(rows, dim, device=device, requires_grad=True) for _ in range(2)]
        loss(*small).backward()
    views = load_file(path, str(device))
    x, y = (views[key].requires_grad_() for key in "xy")
    peak = PeakMemory(device)
    loss(x, y).backward()
    return peak.extra()
