"""The fused backends of the VICReg op behind one pair of functions, `forward` and `backward`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels.core import loader, registry
from vicreg_kernels.vicreg.conventions import covariance_scale
from vicreg_kernels.vicreg.triton import tma

registry.register("vicreg", vicreg=registry.SQUARE)

# Columns of largest scatter that the Gram side takes out and treats exactly (docs/cancellation.md).
DEFLATED_COLUMNS = 4


class Settings(NamedTuple):
    """What a call computes, as the ops take it.

    scales, weights: of invariance, variance and covariance. normalizer: of the covariance; by name,
    because 1 / D as a number would tie a compiled graph to one D. tf32x3: whether float32 is
    multiplied as three TF32 products whatever torch's setting.
    """

    margin: float
    eps: float
    unbiased: bool
    scales: tuple[float, float, float]
    weights: tuple[float, float, float]
    normalizer: str
    tf32x3: bool = False

    def normalized(self, dim: int) -> list[float]:
        """The scales with the covariance normaliser in them."""
        invariance, variance, covariance = self.scales
        return [invariance, variance, covariance * covariance_scale(dim, self.normalizer)]

    def as_reference_takes(self, dim: int) -> tuple[Any, ...]:
        return self.margin, self.eps, self.unbiased, self.normalized(dim), self.weights

    def as_kernels_take(self, dim: int) -> tuple[Any, ...]:
        return *self.as_reference_takes(dim), self.tf32x3


@dataclass(frozen=True)
class Kernels(loader.Functions):
    """x, y, and the gradients: [G, N, D] or [N, D].

    forward(x, y, margin, eps, unbiased, scales, weights, tf32x3) -> the six tensors of op.py;
    backward(grads, x, y, moments, squares, deflated, index, centred, need_x, need_y, margin, eps,
    unbiased, scales, weights, tf32x3) -> (grad_x, grad_y), empty where not needed. tf32x3: whether
    float32 is multiplied as three TF32 products whatever torch's setting; False where left out.
    """

    PRODUCTS = ("forward", "backward")

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, functions: Mapping[str, Callable[..., Any]], backend: str) -> Kernels:
        """Only the CPU kernels take [N, D]; for the others it is one group."""
        if backend == "cpu":
            return cls(**functions)
        forward, backward = functions["forward"], functions["backward"]

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

        return cls(forward_any, backward_any)


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
