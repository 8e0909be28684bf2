"""The fused backends of SIGReg behind one set of functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vicreg_kernels.core import loader, registry
from vicreg_kernels.sigreg import reference

registry.register("sigreg", sigreg=registry.ANY_SIZE, sigreg_directions=registry.ANY_SIZE)


class Settings(NamedTuple):
    """What a call computes, as the op takes it.

    weights: of the knots, with exp(-t^2 / 2) in them. times_rows: the statistic is multiplied by
    the rows of all ranks. drawn: seed and step of the directions, where they are known, which are
    only compared among ranks. group: of the ranks, or None.
    """

    knots: list[float]
    weights: list[float]
    times_rows: bool
    drawn: list[int]
    group: str | None


@dataclass(frozen=True)
class Kernels(loader.Functions):
    """With z [G, N, D], directions A [D, M] of z's dtype and K knots:

    directions(like, step or None, number, seed, dim, slices) -> [dim, slices] of like's dtype and
        device, columns of length 1; number: the step where there is no tensor of it;
    forward(z, A, knots, weights, count, factor) -> (loss, coefficients, p), of the next two for
        one rank;
    sums(z, A, knots) -> (float32 [G, 2, K, M]: over rows, of cos(t p) and sin(t p); p [G, N, M]);
    statistic(sums, knots, weights, count, factor, ranks) -> (loss, coefficients [G, 2, K, M]);
    gradient(grad, coefficients, p, A, knots) -> [G, N, D] in A's dtype.
    """

    PRODUCTS = ("forward", "sums", "gradient")

    directions: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    sums: Callable[..., tuple[Tensor, Tensor]]
    statistic: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., Tensor]


def directions(backend: str) -> Callable[..., Tensor]:
    return (
        _reference_directions
        if backend == "reference"
        else loader.load("sigreg", Kernels, backend).directions
    )


def _reference_directions(
    like: Tensor, step: Tensor | None, number: int, seed: int, dim: int, slices: int
) -> Tensor:
    if step is None:
        step = torch.full((), number, dtype=torch.int64, device=like.device)
    return reference.directions(step, seed, dim, slices).to(like.dtype)
