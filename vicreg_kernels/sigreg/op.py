"""Schemas, fakes, backends and autograd of the SIGReg op; api.py has the public functions.

With z [G, N, D], directions A [D, M], p = z A and K knots t_k, the forward op gives

    loss          float32, 0-d
    coefficients  float32 [G, 2, K, M]   a and b of dp = sum_k a_k cos t_k p + b_k sin t_k p
    projections   float32 [G, N, M]      p

with dp the derivative of the loss by p times the number of ranks, and the backward op turns them
into the gradient dp A^T. Across ranks the forward adds up the 2 G K M sums of cosines and sines,
and the backward exchanges nothing. docs/sigreg.md has the formulas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.core import calls, loader, schema
from vicreg_kernels.core.once import once
from vicreg_kernels.sigreg import contract
from vicreg_kernels.sigreg.contract import Kernels, Settings
from vicreg_kernels.sigreg.ranks import OP, agree

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_LIBRARY.define(
    "sigreg_directions(Tensor like, Tensor? step, SymInt number, int seed, SymInt dim,"
    " SymInt slices, str backend) -> Tensor"
)
_LIBRARY.define(
    "sigreg_forward(Tensor z, Tensor directions, str backend,"
    f" {schema.arguments(Settings, drawn='SymInt[]')}) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "sigreg_backward(Tensor grad, Tensor coefficients, Tensor projections, Tensor directions,"
    " float[] knots, str backend) -> Tensor"
)


@torch.library.impl(_LIBRARY, "sigreg_directions", "CompositeExplicitAutograd")
def _directions(
    like: Tensor, step: Tensor | None, number: int, seed: int, dim: int, slices: int, backend: str
) -> Tensor:
    return contract.directions(backend)(like, step, number, seed, dim, slices)


def _forward(
    z: Tensor, directions: Tensor, backend: str, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = loader.load("sigreg", Kernels, backend)
    knots, weights, times_rows = settings.knots, settings.weights, settings.times_rows
    if settings.group is None:
        count = float(z.shape[1])
        return kernels.forward(z, directions, knots, weights, count, count if times_rows else 1.0)
    among = distributed.by_name(settings.group)
    each = agree(among, z, directions, settings)
    count, ranks = float(sum(each)), float(len(each))
    sums, projections = kernels.sums(z, directions, knots)
    distributed.sum_ranks_(OP, among, sums)
    factor = count if times_rows else 1.0
    return *kernels.statistic(sums, knots, weights, count, factor, ranks), projections


@torch.library.impl(_LIBRARY, "sigreg_forward", "CompositeExplicitAutograd")
def _forward_op(
    z: Tensor, directions: Tensor, backend: str, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(z, directions, backend, Settings(*settings))


@torch.library.impl(_LIBRARY, "sigreg_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor,
    coefficients: Tensor,
    projections: Tensor,
    directions: Tensor,
    knots: list[float],
    backend: str,
) -> Tensor:
    kernels = loader.load("sigreg", Kernels, backend)
    return kernels.gradient(grad, coefficients, projections, directions, knots)


@torch.library.register_fake("vicreg_kernels::sigreg_directions")
def _directions_fake(
    like: Tensor, step: Tensor | None, number: int, seed: int, dim: int, slices: int, backend: str
) -> Tensor:
    return like.new_empty((dim, slices))


@torch.library.register_fake("vicreg_kernels::sigreg_forward")
def _forward_fake(
    z: Tensor, directions: Tensor, backend: str, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    groups, rows, _ = z.shape
    slices, knots = directions.shape[1], Settings(*settings).knots

    def new(*shape: Any) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=z.device)

    return new(), new(groups, 2, len(knots), slices), new(groups, rows, slices)


@torch.library.register_fake("vicreg_kernels::sigreg_backward")
def _backward_fake(
    grad: Tensor, coefficients: Tensor, projections: Tensor, directions: Tensor, *settings: Any
) -> Tensor:
    groups, rows, _ = projections.shape
    return directions.new_empty((groups, rows, directions.shape[0]))


class Draw(NamedTuple):
    """The arguments that determine random directions. `step`, a 0-d tensor, replaces `number`."""

    step: Tensor | None
    number: int
    seed: int
    slices: int


def grouped(z: Tensor, pooled: bool) -> Tensor:
    """z as [G, N, D]."""
    if z.dim() == 2:
        return z.unsqueeze(0)
    return z.reshape(1, -1, z.shape[-1]) if pooled else z


class SIGReg(torch.autograd.Function):
    """Forward saves what the gradient needs, and z, through which a second derivative is detected.
    Backward is one op call. It can be differentiated once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        directions: Tensor | None,
        draw: Draw,
        pooled: bool,
        backend: str,
        settings: Settings,
    ) -> Tensor:
        """directions None: drawn as `draw` says."""
        ops = torch.ops.vicreg_kernels
        direct = calls.direct(z)
        if directions is None:
            run = _directions if direct else ops.sigreg_directions
            step, number, seed, slices = draw
            directions = run(z, step, number, seed, z.shape[-1], slices, backend)
        if direct:
            loss, *saved = _forward(grouped(z, pooled), directions, backend, settings)
        else:
            loss, *saved = ops.sigreg_forward(grouped(z, pooled), directions, backend, *settings)
        ctx.save_for_backward(z, *saved, directions)
        ctx.knots, ctx.backend = settings.knots, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        args = (grad, *ctx.saved_tensors, ctx.knots, ctx.backend)
        return once("SIGReg", _gradient, *args), None, None, None, None, None


def _gradient(grad: Tensor, z: Tensor, *args: Any) -> Tensor:
    run = _backward if calls.direct(z, grad) else torch.ops.vicreg_kernels.sigreg_backward
    gradient = run(grad, *args)
    return gradient if gradient.shape == z.shape else gradient.view(z.shape)
