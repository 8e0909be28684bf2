"""The fused backends of SIGReg behind one set of functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import attrgetter

import torch
from torch import Tensor

from vicreg_kernels import dispatch
from vicreg_kernels.library import NAMESPACES, exact
from vicreg_kernels.sigreg import reference

dispatch.register("sigreg")
dispatch.register("sigreg_directions")


@dataclass(frozen=True)
class Kernels:
    """With z [G, N, D], directions A [D, M] of z's dtype and K knots:

    directions(like, step or None, number, seed, dim, slices) -> [dim, slices] of like's dtype and
        device, columns of length 1; number: the step where there is no tensor of it;
    forward(z, A, knots, weights, count, factor) -> (loss, coefficients, p), of the next two for
        one rank;
    sums(z, A, knots) -> (float32 [G, 2, K, M]: over rows, of cos(t p) and sin(t p); p [G, N, M]);
    statistic(sums, knots, weights, count, factor, ranks) -> (loss, coefficients [G, 2, K, M]);
    gradient(grad, coefficients, p, A, knots) -> [G, N, D] in A's dtype.
    """

    directions: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    sums: Callable[..., tuple[Tensor, Tensor]]
    statistic: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., Tensor]


def _compiled(namespace: str) -> Kernels:
    ops = getattr(torch.ops, namespace)
    # The CPU's products are below the dispatcher, where autocast lowers nothing.
    call = attrgetter("default") if namespace == NAMESPACES["cpu"] else exact
    directions, statistic = ops.sigreg_directions.default, ops.sigreg_statistic.default
    forward, sums, gradient = map(call, (ops.sigreg_forward, ops.sigreg_sums, ops.sigreg_gradient))
    return Kernels(directions, forward, sums, statistic, gradient)


@lru_cache(maxsize=64)
def load(backend: str) -> Kernels:
    if backend == "triton":
        kernels = importlib.import_module("vicreg_kernels.sigreg.triton")
        return Kernels(*(getattr(kernels, field.name) for field in fields(Kernels)))
    return _compiled(NAMESPACES[backend])


def directions(backend: str) -> Callable[..., Tensor]:
    return _reference_directions if backend == "reference" else load(backend).directions


def _reference_directions(
    like: Tensor, step: Tensor | None, number: int, seed: int, dim: int, slices: int
) -> Tensor:
    if step is None:
        step = torch.full((), number, dtype=torch.int64, device=like.device)
    return reference.directions(step, seed, dim, slices).to(like.dtype)
