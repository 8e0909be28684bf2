"""The Gram trick in plain PyTorch: what a user who knows it would write, and the best of it.

With m = min(N, D) both work on the m x m product. `gram_plain` is the straightforward version.
`gram_best` is as fast as plain PyTorch was made to go; measured on one core of an EPYC (Zen 3),
what helps: scatters as a sum of squares (torch.var over rows is 20 to 50 times slower, and
torch.linalg.vector_norm over rows 10 times), mean squared error as a norm (mse_loss is 5 to 20
times slower), the per-column terms written onto the diagonal of the D x D product so that the
gradient is one product, and the square product in block rows so that its symmetric half is
computed once. Subtracting the diagonal costs digits where a few dimensions dominate; the fused op
does not have that error, the baselines do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPS = 1e-4


class _CovarianceTerm(torch.autograd.Function):
    """sum_{i != j} (z_i . z_j)^2, summed over groups: z [..., N, D]."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        rows, dim = z.shape[-2:]
        centred = z - z.mean(dim=-2, keepdim=True)
        scatter = centred.square().sum(dim=-2, keepdim=True)  # [..., 1, D]
        square = centred @ centred.mT if rows < dim else centred.mT @ centred
        ctx.save_for_backward(centred, scatter, square)
        return square.square().sum() - scatter.square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        centred, scatter, square = ctx.saved_tensors
        gram = centred.shape[-2] < centred.shape[-1]
        product = square @ centred if gram else centred @ square
        return torch.addcmul(product, centred, scatter, value=-1) * (4 * grad)


def gram_plain(x: Tensor, y: Tensor) -> Tensor:
    """x, y: [N, D] or [G, N, D] -> the loss of `vicreg_baselines.eager`; half inputs in float32."""
    x, y = x.float(), y.float()
    rows, dim = x.shape[-2:]
    groups = x.shape[0] if x.dim() == 3 else 1
    loss = x.new_zeros(())
    for view in (x, y):
        hinge = torch.relu(1 - torch.sqrt(view.var(dim=-2) + EPS)).mean()
        covariance = _CovarianceTerm.apply(view) / ((rows - 1) ** 2 * dim * groups)
        loss = loss + 25 * (hinge / 2 if x.dim() == 2 else hinge) + covariance
    if x.dim() == 2:
        loss = loss + 25 * torch.nn.functional.mse_loss(x, y)
    return loss


# On the CPU the square product is computed in this many block rows, lower triangle only, once it
# has this many rows: 5/8 of the operations.
BLOCK_ROWS = 4
BLOCKS_FROM = 512


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, float32 also for half operands where torch can."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda":
        flat = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
        return flat.view(*a.shape[:-1], b.shape[-1])
    return a.float() @ b.float()


def _symmetric(z: Tensor) -> Tensor:
    """z z^T for z [..., m, L]."""
    edge = z.shape[-2]
    if z.device.type != "cpu" or edge < BLOCKS_FROM:
        return _product(z, z.mT)
    square = z.new_empty(*z.shape[:-2], edge, edge, dtype=torch.float32)
    step = -(-edge // BLOCK_ROWS)
    for matrix, into in zip(z.flatten(0, -3).float(), square.flatten(0, -3), strict=True):
        for start in range(0, edge, step):
            stop = min(start + step, edge)
            torch.mm(matrix[start:stop], matrix[:stop].T, out=into[start:stop, :stop])
            into[:start, start:stop] = into[start:stop, :start].T
    return square


class _Loss(torch.autograd.Function):
    """The whole loss, with its gradient by hand; x, y: [G, N, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, invariance: bool) -> Tensor:
        groups, rows, dim = x.shape
        gram = rows < dim
        centred = torch.empty((2, *x.shape), dtype=x.dtype, device=x.device)
        for view, into in zip((x, y), centred, strict=True):
            torch.sub(view, view.mean(dim=-2, keepdim=True), out=into)
        square = _symmetric(centred if gram else centred.mT)  # [2, G, m, m]
        if gram:
            scatter = torch.empty((2, groups, dim), device=x.device)
            for view, into in zip(centred, scatter, strict=True):
                torch.sum(view.float().square(), dim=-2, out=into)
        else:
            scatter = square.diagonal(dim1=-2, dim2=-1).contiguous()  # [2, G, D]
        std = torch.sqrt(scatter / (rows - 1) + EPS)
        hinge = torch.relu(1 - std).sum()
        if gram:
            off_diagonal = _squared_norm(square) - _squared_norm(scatter)
        else:  # without its diagonal the norm needs no subtraction
            square.diagonal(dim1=-2, dim2=-1).zero_()
            off_diagonal = _squared_norm(square)
        variance_weight = 25 * (0.5 if invariance else 1.0) / (groups * dim)
        covariance_weight = 1 / ((rows - 1) ** 2 * dim * groups)
        loss = hinge * variance_weight + off_diagonal * covariance_weight
        difference = None
        if invariance:
            difference = x - y
            loss = loss + _squared_norm(difference) * (25 / difference.numel())
        ctx.save_for_backward(centred, square, scatter, std, difference)
        ctx.weights = variance_weight, covariance_weight
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        centred, square, scatter, std, difference = ctx.saved_tensors
        variance_weight, covariance_weight = ctx.weights
        rows, dim = centred.shape[-2:]
        gram = rows < dim
        dtype = centred.dtype
        factor = grad * (4 * covariance_weight)
        column = (std < 1) / std * (grad * (-variance_weight / (rows - 1)))
        if gram:
            column = torch.addcmul(column, scatter, factor, value=-1)
        weight = square * factor
        if not gram:  # the per-column terms ride on the product's diagonal
            weight.diagonal(dim1=-2, dim2=-1).copy_(column)
        weight, column = weight.to(dtype), column.to(dtype).unsqueeze(-2)
        out = torch.empty_like(centred)
        if difference is not None:
            torch.mul(difference, (grad * (50 / difference.numel())).to(dtype), out=out[0])
            torch.neg(out[0], out=out[1])
        if gram:
            if difference is None:
                torch.mul(centred, column, out=out)
            else:
                out.addcmul_(centred, column)
        left, right = (weight, centred) if gram else (centred, weight)
        beta = 1 if gram or difference is not None else 0
        if out.device.type == "cpu":  # matrix by matrix, each threaded by MKL
            for o, a, b in zip(*(t.flatten(0, 1) for t in (out, left, right)), strict=True):
                o.addmm_(a, b, beta=beta)
        else:
            flat = (t.flatten(0, 1) for t in (out, left, right))
            next(flat).baddbmm_(*flat, beta=beta)
        return out[0], out[1], None


def _squared_norm(z: Tensor) -> Tensor:
    """sum z^2, accumulated in float32."""
    if z.device.type == "cpu" and z.dtype == torch.float32:
        flat = z.flatten()
        return torch.dot(flat, flat)
    return torch.linalg.vector_norm(z, dtype=torch.float32).square()


def gram_best(x: Tensor, y: Tensor) -> Tensor:
    """x, y: [N, D] or [G, N, D] -> the loss of `vicreg_baselines.eager`."""
    if x.dim() == 2:
        return _Loss.apply(x.unsqueeze(0), y.unsqueeze(0), True)
    return _Loss.apply(x, y, False)
