"""The fused backends of the op behind one pair of functions, `forward` and `backward`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kernels:
    """forward(x, y, eps, std_eps, unbiased, lambd) -> the five tensors of op.py;
    backward(grad, x, y, moments, diagonal, products, standardised, need_x, need_y, eps, std_eps,
    unbiased, lambd) -> (grad_x, grad_y), empty where not needed.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, Tensor]]


def _compiled(namespace: str) -> Kernels:
    """The kernels of a compiled library; autocast must not lower the products inside."""
    ops = getattr(torch.ops, namespace)

    def forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        with _exact(x.device.type):
            return ops.barlow_forward(x, *rest)

    def backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        with _exact(x.device.type):
            return ops.barlow_backward(grad, x, *rest)

    return Kernels(forward, backward)


def _exact(device_type: str) -> Any:
    """Keeps autocast off; entering its context costs 20 us a call, so only where it is on."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@cache
def load(backend: str) -> Kernels:
    if backend == "triton":
        kernels = importlib.import_module("vicreg_kernels.barlow.triton")
        return Kernels(kernels.forward, kernels.backward)
    return _compiled({"cpu": "vicreg_kernels_cpu", "cuda": "vicreg_kernels_cuda"}[backend])


def empty_saved(x: Tensor, backend: str) -> tuple[Tensor, ...]:
    """Uninitialised outputs of the forward op for x: [N, D]; the one place that says shapes."""
    rows, dim = x.shape
    gram = rows < dim

    def new(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    return (
        new(1),
        new(2, 3, dim),
        new(dim),
        new(2, rows, rows) if gram else new(1, dim, dim),
        new(2, rows, dim, dtype=x.dtype) if backend == "cuda" else new(0),
    )
