"""The fused backends of the VICReg op behind one pair of functions, `forward` and `backward`."""

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
from vicreg_kernels.vicreg import tma

dispatch.register("vicreg", dispatch.SQUARE)

# Columns of largest scatter that the Gram side takes out and treats exactly (docs/cancellation.md).
DEFLATED_COLUMNS = 4


@dataclass(frozen=True)
class Kernels:
    """x, y, and the gradients: [G, N, D] or [N, D].

    forward(x, y, margin, eps, unbiased, scales, weights, tf32x3) -> the six tensors of op.py;
    backward(grads, x, y, moments, squares, deflated, index, centred, need_x, need_y, margin, eps,
    unbiased, scales, weights, tf32x3) -> (grad_x, grad_y), empty where not needed. tf32x3: whether
    float32 is multiplied as three TF32 products whatever torch's setting; False where left out.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, Tensor]]


def _grouped(forward: Callable[..., Any], backward: Callable[..., Any]) -> Kernels:
    """Of kernels that take [G, N, D] alone."""

    def leading(z: Tensor | None) -> Tensor | None:
        return None if z is None else z.unsqueeze(0)

    def forward_any(x: Tensor, y: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        if x.dim() == 3:
            return forward(x, y, *rest)
        return forward(x.unsqueeze(0), leading(y), *rest)

    def backward_any(grads: Tensor, x: Tensor, y: Tensor | None, *rest: Any) -> Any:
        if x.dim() == 3:
            return backward(grads, x, y, *rest)
        grad_x, grad_y = backward(grads, x.unsqueeze(0), leading(y), *rest)
        return grad_x.squeeze(0), grad_y.squeeze(0)

    return Kernels(forward_any, backward_any)


def _compiled(namespace: str) -> Kernels:
    ops = getattr(torch.ops, namespace)
    if namespace == NAMESPACES["cpu"]:  # its products are below the dispatcher: nothing is lowered
        return Kernels(ops.vicreg_forward.default, ops.vicreg_backward.default)
    return _grouped(exact(ops.vicreg_forward), exact(ops.vicreg_backward))


@lru_cache(maxsize=64)
def load(backend: str) -> Kernels:
    if backend == "triton":
        kernels = importlib.import_module("vicreg_kernels.vicreg.triton")
        return _grouped(kernels.forward, kernels.backward)
    return _compiled(NAMESPACES[backend])


def empty_saved(x: Tensor, views: int, backend: str) -> tuple[Tensor, ...]:
    """Uninitialised outputs of the forward op for x; the one place that says shapes."""
    groups, rows, dim = x.shape if x.dim() == 3 else (1, *x.shape)
    gram = rows < dim
    side = rows if gram else dim
    deflated = min(DEFLATED_COLUMNS, dim) if gram else 0
    operands = backend == "triton" and tma.saves_operands(x)  # the gradient's product's, as it is

    def new(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    return (
        new(4),
        new(views, groups, 3, dim),
        new(views, groups, side, side, dtype=x.dtype if operands else torch.float32),
        new(views, groups, deflated, rows),
        new(views, groups, deflated, dtype=torch.int64),
        new(views, groups, rows, dim, dtype=x.dtype) if backend == "cuda" or operands else new(0),
    )
