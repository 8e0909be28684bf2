"""The backends of the EMA op behind one function; reference.py's `update_` says what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from vicreg_kernels.core import loader, registry

registry.register("ema", ema_update_=registry.ANY_SIZE)


class Settings(NamedTuple):
    """What a call computes, as the op takes it. momentum_tensor, step_tensor: 0-d tensors that a
    captured CUDA graph reads at each replay; where they are given, the numbers are not read.
    """

    momentum_tensor: Tensor | None
    momentum: float
    stochastic: bool
    seed: int
    step_tensor: Tensor | None
    step: int


@dataclass(frozen=True)
class Kernels(loader.Functions):
    """update_(targets, onlines, shadows, *Settings), and for the compiled backends `checked`; those
    return whether they ran.
    """

    update_: Callable[..., Any]
