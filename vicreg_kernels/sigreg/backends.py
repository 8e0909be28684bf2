"""The fused backends of SIGReg behind one set of four functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

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
    ops = getattr(torch.ops, namespace)
    sums, gradient = exact(ops.sigreg_sums), exact(ops.sigreg_gradient)
    return Kernels(ops.sigreg_directions, sums, ops.sigreg_statistic, gradient)


@cache
def load(backend: str) -> Kernels:
    if backend == "triton":
        kernels = importlib.import_module("vicreg_kernels.sigreg.triton")
        return Kernels(kernels.directions, kernels.sums, kernels.statistic, kernels.gradient)
    return _compiled(NAMESPACES[backend])


def directions(backend: str) -> Callable[..., Tensor]:
    return reference.directions if backend == "reference" else load(backend).directions
