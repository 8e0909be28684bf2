"""The fused backends of the op behind one pair of functions, `forward` and `backward`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels.core import loader, registry

registry.register("barlow", barlow=registry.SQUARE)


class Settings(NamedTuple):
    """What a call computes, as the ops take it: the convention's numbers.

    eps: added to the variance under the root; std_eps: to the standard deviation. tf32x3: whether
    float32 is multiplied as three TF32 products whatever torch's setting.
    """

    eps: float
    std_eps: float
    unbiased: bool
    lambd: float
    tf32x3: bool = False

    def as_reference_takes(self) -> tuple[float, float, bool, float]:
        return self.eps, self.std_eps, self.unbiased, self.lambd


@dataclass(frozen=True)
class Kernels(loader.Functions):
    """forward(x, y, eps, std_eps, unbiased, lambd, tf32x3) -> the five tensors of op.py;
    backward(grad, x, y, moments, diagonal, products, standardised, need_x, need_y, eps, std_eps,
    unbiased, lambd, tf32x3) -> (grad_x, grad_y), empty where not needed. tf32x3: whether float32 is
    multiplied as three TF32 products whatever torch's setting; False where left out.
    """

    PRODUCTS = ("forward", "backward")

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, Tensor]]


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
