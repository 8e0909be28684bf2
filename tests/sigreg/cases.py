"""What the tests of the SIGReg op's kernels share: knots, unit directions, and the comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.helpers.tolerances import (
    FEWEST_ROUNDINGS,
    PLAIN_FACTOR,
    Outcome,
    assert_close_to_truth,
    assert_matches_reference,
    differentiate,
)
from vicreg_kernels.sigreg import contract, reference, sigreg_loss

# The positive knots of the variants and of longer rules, from spacing or half of it, and any.
KNOTS = {
    "17": [3 * k / 16 for k in range(1, 17)],
    "10": [(k + 0.5) * 6 / 9 for k in range(5)],
    "41": [5 * k / 40 for k in range(1, 41)],
    "most": [0.1 * (k + 0.5) for k in range(64)],
    "two": [0.8, 1.6],
    "one": [1.3],
    "free": [0.2, 0.7, 2.5],
    "squares": [0.02 * k * k for k in range(1, 20)],
}


def unit(dim: int, slices: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Random unit directions [dim, slices], drawn on the CPU and rounded to dtype."""
    columns = torch.nn.functional.normalize(torch.randn(dim, slices, dtype=torch.float64), dim=0)
    return columns.to(device=device, dtype=dtype)


def weights(knots: Sequence[float]) -> list[float]:
    return [0.3 * math.exp(-0.5 * t * t) for t in knots]


def check(backend: str, z: Tensor, slices: int, **settings: object) -> Outcome:
    """Hold loss and gradient of sigreg_loss to the one rule of tolerances.py, and the loss of half
    inputs to float32's eps: their products are exact in float32.
    """
    directions = unit(z.shape[-1], slices, z.dtype, str(z.device))

    def function(z: Tensor, backend: str) -> Tensor:
        return sigreg_loss(z, directions=directions, backend=backend, **settings)

    name = f"{tuple(z.shape)}x{slices} {z.dtype}"
    outcome = assert_matches_reference(function, backend, z, name=name, cotangents=(0.7,))
    if z.dtype != torch.float32:
        wide = function(z.detach().double(), "reference")
        narrow = function(z.detach(), "reference")
        length = max(z.shape[-2] + z.shape[-1], FEWEST_ROUNDINGS)
        assert_close_to_truth(outcome.values[0], wide, narrow, torch.float32, length, name)
    return outcome


def column_sums(projections: Tensor, knots: Sequence[float]) -> Tensor:
    """[G, 2, K, M] of projections [G, N, M], in their dtype."""
    angles = projections.unsqueeze(-1) * torch.tensor(knots).to(projections)
    sums = torch.stack((angles.cos().sum(1), angles.sin().sum(1)), dim=1)
    return sums.transpose(2, 3).contiguous()


def check_sums(
    kernels: contract.Kernels, z: Tensor, directions: Tensor, knots: list[float]
) -> None:
    """Projections and column sums, the sums at the projections that the kernels found."""
    sums, projections = kernels.sums(z, directions, knots)
    truth = z.double() @ directions.double()
    plain = z.float() @ directions.float()
    length = max(z.shape[-1], FEWEST_ROUNDINGS)
    assert_close_to_truth(projections, truth, plain, torch.float32, length, "projections")
    truth, plain = column_sums(projections.double(), knots), column_sums(projections, knots)
    # The sums of waves cancel; what is bounded is the error of a row, on average over rows.
    error = (sums.double() - truth).abs().max().item()
    bound = PLAIN_FACTOR * (plain.double() - truth).abs().max().item()
    rows = z.shape[1]
    roundings = len(knots) * torch.finfo(torch.float32).eps
    assert sums.shape == truth.shape
    assert error <= bound + roundings * rows**0.5, f"{error:.2e} > {bound:.2e} + {roundings:.1e}"


def check_gradient(
    kernels: contract.Kernels,
    rows: int,
    dim: int,
    slices: int,
    knots: list[float],
    dtype: torch.dtype = torch.float32,
    groups: int = 1,
    scale: float = 1.0,
    grad: float = 1.0,
    spread: float = 1.0,
) -> None:
    """gradient() with random coefficients, times `scale`, at projections up to about 4 spread."""
    coefficients = scale * torch.randn(groups, 2, len(knots), slices)
    coefficients *= torch.tensor(weights(knots))[:, None]
    projections = spread * torch.randn(groups, rows, slices)
    directions = unit(dim, slices, dtype)
    upstream = torch.tensor([grad])

    def formula(wide: torch.dtype) -> Tensor:
        t = torch.tensor(knots, dtype=torch.float64).to(wide)
        angles = projections.to(wide).unsqueeze(-1) * t
        a, b = coefficients.to(wide).transpose(2, 3).unsqueeze(2).unbind(1)
        waves = (a * angles.cos() + b * angles.sin()).sum(-1) * upstream.to(wide)
        return waves @ directions.to(wide).t()

    gradient = kernels.gradient(upstream, coefficients, projections, directions, knots)
    assert gradient.dtype == dtype
    plain = formula(torch.float32).to(dtype)
    length = max(slices, FEWEST_ROUNDINGS)
    assert_close_to_truth(gradient, formula(torch.float64), plain, dtype, length, "gradient")


def check_statistic(
    kernels: contract.Kernels, groups: int, slices: int, knots: list[float], ranks: float
) -> None:
    """loss and coefficients against their definition, by autograd in float64."""
    count, factor = 50.0, 3.0
    projections = torch.randn(groups, int(count), slices)
    sums = column_sums(projections.double(), knots).float()
    loss, coefficients = kernels.statistic(sums, knots, weights(knots), count, factor, ranks)
    p = projections.double().requires_grad_()
    eye = torch.eye(slices, dtype=torch.float64)
    truth = reference.loss(p, eye, knots, weights(knots), count, factor)
    (slope,) = torch.autograd.grad(ranks * truth, p)
    angles = p.detach().unsqueeze(-1) * torch.tensor(knots).double()
    a, b = coefficients.double().transpose(2, 3).unsqueeze(2).unbind(1)
    derivative = (a * angles.cos() + b * angles.sin()).sum(-1)
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-6, atol=0)
    error = (derivative - slope).abs().max() / slope.abs().max()
    assert error <= 1e-5, f"coefficients: {error:.1e}"


def check_directions(
    kernels: contract.Kernels, dim: int, slices: int, seed: int, step: int, device: str = "cpu"
) -> None:
    """The reference's, within a few roundings of the largest entry."""
    now = torch.tensor(step, device=device)
    wanted = reference.directions(now, seed, dim, slices)
    like = torch.empty(0, device=device)
    drawn = kernels.directions(like, now, 0, seed, dim, slices)
    assert drawn.shape == wanted.shape == (dim, slices)
    torch.testing.assert_close(drawn, wanted, rtol=1e-6, atol=5e-7)
    assert torch.equal(kernels.directions(like, None, step, seed, dim, slices), drawn)
    for half in (torch.bfloat16, torch.float16):
        narrow = kernels.directions(like.to(half), now, 0, seed, dim, slices)
        assert torch.equal(narrow, drawn.to(half))


def same_finiteness(backend: str, bad: float) -> None:
    """NaN and Inf come out where the reference has them."""
    z = torch.randn(2, 9, 4)
    z[1, 3, 2] = bad
    directions = unit(4, 6)
    runs = [
        differentiate(
            lambda z, b=b: sigreg_loss(z, directions=directions, backend=b),
            z.clone().requires_grad_(),
        )
        for b in (backend, "reference")
    ]
    (value, grad), (true_value, true_grad) = ((r.values[0], r.gradients[0]) for r in runs)
    assert value.isnan()
    assert true_value.isnan()
    assert torch.equal(grad.isnan(), true_grad.isnan())
