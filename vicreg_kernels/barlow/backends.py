"""The fused backends of the op behind one pair of functions, `forward` and `backward`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import dispatch
from vicreg_kernels.library import NAMESPACES, exact

dispatch.register("barlow", dispatch.SQUARE)


@dataclass(frozen=True)
class Kernels:
    """forward(x, y, eps, std_eps, unbiased, lambd, tf32x3) -> the five tensors of op.py;
    backward(grad, x, y, moments, diagonal, products, standardised, need_x, need_y, eps, std_eps,
    unbiased, lambd, tf32x3) -> (grad_x, grad_y), empty where not needed. tf32x3: whether float32 is
    multiplied as three TF32 products whatever torch's setting; False where left out.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, Tensor]]


def _compiled(namespace: str) -> Kernels:
    ops = getattr(torch.ops, namespace)
    if namespace == NAMESPACES["cpu"]:  # its products are below the dispatcher: nothing is lowered
        return Kernels(ops.barlow_forward.default, ops.barlow_backward.default)
    return Kernels(exact(ops.barlow_forward), exact(ops.barlow_backward))


@lru_cache(maxsize=64)
def load(backend: str) -> Kernels:
    if backend == "triton":
        kernels = importlib.import_module("vicreg_kernels.barlow.triton")
        return Kernels(kernels.forward, kernels.backward)
    return _compiled(NAMESPACES[backend])


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
