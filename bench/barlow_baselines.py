"""What the Barlow Twins op is measured against: the published formula, two Gram versions, lightly.

A baseline maps two views [N, D] to the loss, differentiable in both. With m = min(N, D) the Gram
versions work on m x m products. `gram_plain` is what a user who knows the trick would write;
`gram_best` is as fast as plain PyTorch was made to go: the standardisation and its gradient by
hand (batch_norm's own backward is slower on the CPU), the symmetric products in block rows,
everything elementwise in place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.measure import compiled
from bench.vicreg_baselines import off_diagonal
from bench.vicreg_gram import _symmetric

Loss = Callable[[Tensor, Tensor], Tensor]

EPS = 1e-5
LAMBD = 0.0051


def _standardised(x: Tensor) -> Tensor:
    return functional.batch_norm(x, None, None, training=True, eps=EPS)


def eager(x: Tensor, y: Tensor) -> Tensor:
    """The published formula: BatchNorm without affine, a D x D cross-correlation, its off-diagonal
    copied, squared, summed.
    """
    correlation = (_standardised(x).T @ _standardised(y)).div_(x.shape[0])
    on_diagonal = torch.diagonal(correlation).add(-1).pow_(2).sum()
    return on_diagonal + LAMBD * off_diagonal(correlation).pow_(2).sum()


class _SquaredCorrelation(torch.autograd.Function):
    """||z1^T z2||^2 on the side of the smaller of N and D."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        if first.shape[0] < first.shape[1]:
            grams = first @ first.T, second @ second.T
            ctx.save_for_backward(first, second, *grams)
            return torch.dot(grams[0].flatten(), grams[1].flatten())
        correlation = first.T @ second
        ctx.save_for_backward(first, second, correlation)
        return correlation.square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        first, second, *squares = ctx.saved_tensors
        if len(squares) == 2:
            return squares[1] @ first * (2 * grad), squares[0] @ second * (2 * grad)
        (correlation,) = squares
        return second @ correlation.T * (2 * grad), first @ correlation * (2 * grad)


def gram_plain(x: Tensor, y: Tensor) -> Tensor:
    """The loss of `eager`; half inputs in float32."""
    first, second = _standardised(x.float()), _standardised(y.float())
    diagonal = (first * second).sum(dim=0)
    squared = _SquaredCorrelation.apply(first, second) - diagonal.square().sum()
    rows = x.shape[0]
    return (diagonal / rows - 1).square().sum() + LAMBD / rows**2 * squared


class _Loss(torch.autograd.Function):
    """The whole loss with its gradient by hand; x, y: [N, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        rows, dim = x.shape
        z = torch.empty((2, rows, dim), dtype=torch.float32, device=x.device)
        inverse = torch.empty((2, 1, dim), device=x.device)
        for view, into, scale in zip((x, y), z, inverse, strict=True):
            torch.sub(view, view.mean(dim=0, dtype=torch.float32), out=into)
            torch.rsqrt(into.square().sum(dim=0, keepdim=True).div_(rows).add_(EPS), out=scale)
            into.mul_(scale)
        if rows < dim:
            square = _symmetric(z)
            diagonal = (z[0] * z[1]).sum(dim=0).div_(rows)
            squared = torch.dot(square[0].flatten(), square[1].flatten()) / rows**2
            squared = squared - torch.dot(diagonal, diagonal)
        else:
            square = (z[0].T @ z[1]).div_(rows).unsqueeze(0)
            diagonal = square[0].diagonal().clone()
            square[0].diagonal().zero_()
            squared = torch.dot(square.flatten(), square.flatten())
        ctx.save_for_backward(z, inverse, square, diagonal)
        ctx.dtype = x.dtype
        return (diagonal - 1).square().sum() + LAMBD * squared

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        z, inverse, square, diagonal = ctx.saved_tensors
        rows, dim = z.shape[1:]
        gram = rows < dim
        scale = inverse * grad
        slope = 2 / rows * (diagonal * (1 - LAMBD) - 1 if gram else diagonal - 1)
        out = torch.empty_like(z)
        for v in range(2):
            if gram:
                torch.mm(square[1 - v], z[v], out=out[v])
                dots = (out[v] * z[v]).sum(dim=0)
                factor = 2 * LAMBD / rows**2
            else:
                torch.mm(z[1 - v], square[0].T if v == 0 else square[0], out=out[v])
                dots = square[0].square().sum(dim=1 - v).mul_(rows)
                factor = 2 * LAMBD / rows
            radial = (factor * dots).addcmul_(slope, diagonal, value=rows).div_(-rows)
            out[v].mul_(factor * scale[v])
            out[v].addcmul_(z[1 - v], slope * scale[v])
            out[v].addcmul_(z[v], radial * scale[v])
        return out[0].to(ctx.dtype), out[1].to(ctx.dtype)


def gram_best(x: Tensor, y: Tensor) -> Tensor:
    """The loss of `eager`."""
    return _Loss.apply(x, y)


def lightly_loss() -> Loss:
    """lightly's BarlowTwinsLoss, loaded by path: importing lightly.loss would need torchvision."""
    package = importlib.util.find_spec("lightly")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("lightly is not installed")
    path = Path(package.submodule_search_locations[0]) / "loss" / "barlow_twins_loss.py"
    spec = importlib.util.spec_from_file_location("_lightly_barlow_twins_loss", path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{path} cannot be loaded")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BarlowTwinsLoss(lambda_param=LAMBD)


# Each builds its baseline; a peer that is not installed raises ImportError.
BASELINES: dict[str, Callable[[], Loss]] = {
    "eager": lambda: eager,
    "compiled": lambda: compiled(eager),
    "gram_plain": lambda: gram_plain,
    "gram_compiled": lambda: compiled(gram_plain),
    "gram_best": lambda: gram_best,
    "lightly": lightly_loss,
}
COMPILED = ("compiled", "gram_compiled")
PEERS = ("lightly",)
