"""The fused backends of SIGReg behind one set of four functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels.sigreg import reference


@dataclass(frozen=True)
class Kernels:
    """With z [G, N, D], directions A [D, M] of z's dtype and K knots:

    directions(step, seed, dim, slices) -> float32 [dim, slices], columns of length 1;
    sums(z, A, knots) -> (float32 [G, 2, K, M]: over rows, of cos(t p) and sin(t p); p [G, N, M]);
    statistic(sums, knots, weights, count, factor, ranks) -> (loss [1], coefficients [G, 2, K, M]);
    gradient(grad [1], coefficients, p, A, knots) -> [G, N, D] in A's dtype.
    """

    directions: Callable[..., Tensor]
    sums: Callable[..., tuple[Tensor, Tensor]]
    statistic: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., Tensor]


def _compiled(namespace: str) -> Kernels:
    """The kernels of a compiled library; autocast must not lower the products inside."""
    ops = getattr(torch.ops, namespace)

    def sums(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        with _exact(z.device.type):
            return ops.sigreg_sums(z, *rest)

    def gradient(grad: Tensor, *rest: Any) -> Tensor:
        with _exact(grad.device.type):
            return ops.sigreg_gradient(grad, *rest)

    return Kernels(ops.sigreg_directions, sums, ops.sigreg_statistic, gradient)


def _exact(device_type: str) -> Any:
    """Keeps autocast off; entering its context costs 20 us a call, so only where it is on."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@cache
def load(backend: str) -> Kernels:
    if backend == "triton":
        kernels = importlib.import_module("vicreg_kernels.sigreg.triton")
        return Kernels(kernels.directions, kernels.sums, kernels.statistic, kernels.gradient)
    return _compiled({"cpu": "vicreg_kernels_cpu", "cuda": "vicreg_kernels_cuda"}[backend])


def directions(backend: str) -> Callable[..., Tensor]:
    return reference.directions if backend == "reference" else load(backend).directions
