"""Interleaved timing: on a shared machine only times measured side by side can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def interleaved(
    actions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 2,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each action, `rounds` times, in turns A B A B; the warm-up is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warmup + rounds):
        for name, action in actions.items():
            _wait(device)
            start = time.perf_counter()
            action()
            _wait(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
        after_round()
    return seconds


def median_ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """The median of the rounds' ratios, on which a slow phase of the machine has little effect."""
    return statistics.median(s / f for s, f in zip(slower, faster, strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
