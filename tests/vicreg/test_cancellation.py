"""Tier 2: the covariance term where subtracting squares would lose its digits.

docs/cancellation.md says when and by how much; the bounds here are what it promises.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import shapes
from tests.helpers.tolerances import (
    CANCELLATION,
    PLAIN_FACTOR,
    column_errors,
    differentiate,
    relative_error,
)
from vicreg_kernels import variance_covariance
from vicreg_kernels.vicreg.contract import DEFLATED_COLUMNS


def covariance(z, backend):
    return variance_covariance(z, backend=backend)[1]


def covariance_outcomes(fused, z):
    """The covariance term and its gradient: on the backend, in the plain formula, in float64."""
    z = z.to(fused.device).requires_grad_()
    wide = z.detach().double().requires_grad_()
    actual = differentiate(lambda z: covariance(z, fused.name), z)
    plain = differentiate(lambda z: covariance(z, "reference"), z)
    truth = differentiate(lambda z: covariance(z, "reference"), wide)
    return actual, plain, truth


def assert_no_cancellation(fused, z):
    actual, plain, truth = covariance_outcomes(fused, z)
    assert relative_error(actual.values[0], truth.values[0]) <= CANCELLATION
    mine, theirs, true = (outcome.gradients[0] for outcome in (actual, plain, truth))
    assert relative_error(mine, true) <= CANCELLATION
    allowed = max(CANCELLATION, PLAIN_FACTOR * column_errors(theirs, true).max().item())
    by_column = column_errors(mine, true)
    assert by_column.max() <= allowed, f"column {int(by_column.argmax())}"


@pytest.mark.parametrize(("rows", "dim", "scale"), [(64, 512, 300.0), (256, 2048, 100.0)])
def test_one_dimension_dominates(fused, rows, dim, scale):
    assert_no_cancellation(fused, shapes.dominated(rows, dim, scale))


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "dim", "scale"), [(64, 512, 300.0), (128, 1024, 1000.0)])
def test_several_dimensions_dominate(fused, rows, dim, scale, count):
    assert_no_cancellation(fused, shapes.dominated(rows, dim, scale, count))


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_scales_decay(fused, ratio):
    assert_no_cancellation(fused, shapes.decaying(64, 512, ratio))


@pytest.mark.parametrize("grouped", [(3, 32, 96)])
def test_dominating_dimensions_differ_by_group(fused, grouped):
    groups, rows, dim = grouped
    z = torch.stack([shapes.dominated(rows, dim, 300.0).roll(7 * g, 1) for g in range(groups)])
    assert_no_cancellation(fused, z)


@pytest.mark.parametrize("count", [1, 4])
def test_orthogonal_dimensions_dominate(fused, count):
    """Dominating and uncorrelated: nothing they share hides what is lost of the others."""
    z = torch.randn(64, 512)
    z[:, 100 : 100 + count] = 300 * shapes.white(64, count)
    assert_no_cancellation(fused, z)


@pytest.mark.parametrize("count", [6, 12])
def test_beyond_the_deflated_columns(fused, count):
    """More uncorrelated dominating dimensions than are taken out: the error is that of
    subtracting the remaining squares, eps sqrt(D) of them, and no more.
    """
    rows, dim = 64, 512
    z = torch.randn(rows, dim)
    z[:, :count] = 300 * shapes.white(rows, count)
    actual, _, truth = covariance_outcomes(fused, z)
    wide = z.detach().double()
    scatter = (wide - wide.mean(dim=0)).square().sum(dim=0).sort().values
    subtracted = scatter[:-DEFLATED_COLUMNS].square().sum() / ((rows - 1) ** 2 * dim)
    value, true = actual.values[0].item(), truth.values[0].item()
    assert abs(value - true) <= CANCELLATION * true + 2**-23 * dim**0.5 * subtracted
    assert relative_error(actual.gradients[0], truth.gradients[0]) <= CANCELLATION


@pytest.mark.triton_takes(lambda rows, **_: rows == 4096)
@pytest.mark.parametrize(("rows", "dim"), [(4096, 64), (600, 512)])
def test_near_white(fused, rows, dim):
    """No worse than twice the plain D x D formula in float32, with nothing added for rounding."""
    actual, plain, truth = covariance_outcomes(fused, shapes.white(rows, dim).contiguous())
    for k in ("values", "gradients"):
        mine, theirs, true = (getattr(o, k)[0] for o in (actual, plain, truth))
        assert relative_error(mine, true) <= PLAIN_FACTOR * relative_error(theirs, true)


@pytest.mark.parametrize("rows", [9, 32, 33, 200])
def test_a_deviation_near_the_margin(fused, rows):
    """margin - deviation keeps the roundings of the deviation, of which there are two at most,
    also where the first row lies far from the mean.
    """
    eps = torch.finfo(torch.float32).eps
    for seed in range(20):
        z = torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed)).expand(rows, 2)
        z = z.clone()
        z[0] = 4.0
        deviation = z[:, 0].double().std().item()
        margin = 1.01 * deviation
        value, _ = variance_covariance(
            z.to(fused.device), margin=margin, eps=0.0, backend=fused.name
        )
        assert abs(value.item() - (margin - deviation)) <= 2.0 * eps * deviation, seed
