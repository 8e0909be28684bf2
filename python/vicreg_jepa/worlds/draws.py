"""Random numbers of a counter-based generator: a number depends on its seed, stream and time, and
never on the batch.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """The purpose of random numbers: each has its own stream."""

    LAYOUT = 1
    PLACES = 2  # of the start and the goal
    NOISE = 3
    POLICY = 4
    PHASE = 5
    JITTER = 6
    PLAN = 7  # the candidates of planners
    ZONE = 8  # forbidden zones
    WINDOW = 9  # where in an episode a window begins
    THINGS = 10  # the cells that hold a thing


def uniform(seed: Tensor, stream: Stream, time: Tensor | int, count: int) -> Tensor:
    """float32 [N, count] in [0, 1), multiples of 2**-24. seed: int64 [N]; time: int64 [N], or an
    integer.
    """
    key = _mixed(_mixed(seed + _wrapped(0x9E3779B97F4A7C15 * int(stream))) + time)
    steps = torch.arange(1, count + 1, device=seed.device) * _wrapped(0x9E3779B97F4A7C15)
    bits = _logical(_mixed(key[:, None] + steps), 40)
    return bits.float() * 2.0**-24


def integers(u: Tensor, least: int, most: int) -> Tensor:
    """Map uniform numbers u to int64 in [least, most], all equally likely."""
    return (least + (u * (most - least + 1)).long()).clamp(max=most)


def between(u: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Map uniform numbers u to float32 in [low, high]."""
    return torch.clamp(low + u * (high - low), min=low, max=high)


def _mixed(z: Tensor) -> Tensor:
    """The finaliser of splitmix64, on int64 with overflow."""
    z = (z ^ _logical(z, 30)) * _wrapped(0xBF58476D1CE4E5B9)
    z = (z ^ _logical(z, 27)) * _wrapped(0x94D049BB133111EB)
    return z ^ _logical(z, 31)


def _logical(z: Tensor, places: int) -> Tensor:
    """The logical right shift, as of an unsigned integer."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _wrapped(value: int) -> int:
    """The signed 64-bit integer with the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
