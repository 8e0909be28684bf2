"""Tier 1: the reference against closed forms, sums written out by hand, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.helpers.tolerances import SAME_FORMULA, differentiate
from vicreg_kernels.barlow import BarlowTwinsLoss, barlow_twins_loss
from vicreg_kernels.barlow.conventions import CONVENTIONS


def close(actual, expected, tolerance=SAME_FORMULA) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def double(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def hadamard(order: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


def test_worked_example():
    """Orthogonal columns of variance 1 in x; y shares the first and mixes the second."""
    h = hadamard(4)[:, 1:]
    x = h[:, :2]
    y = torch.stack([h[:, 0], 0.6 * h[:, 0] + 0.8 * h[:, 1]], dim=1)
    # C = [[1, 0.6], [0, 0.8]]
    close(barlow_twins_loss(x, y, lambd=0.5, eps=0.0), 0.2**2 + 0.5 * 0.6**2)
    close(barlow_twins_loss(x + 3.0, 2.0 * y, lambd=0.5, eps=0.0), 0.2**2 + 0.5 * 0.6**2)
    # eps = 3 halves each view: C / 4
    close(barlow_twins_loss(x, y, lambd=0.5, eps=3.0), 0.75**2 + 0.8**2 + 0.5 * 0.15**2)
    # the unbiased deviation with the mean over N: C * 3 / 4
    unbiased = barlow_twins_loss(x, y, lambd=0.5, eps=0.0, convention="monai")
    close(unbiased, 0.25**2 + 0.4**2 + 0.5 * 0.45**2)
    # eps beside the deviation
    std = math.sqrt(4 / 3)
    c = (1 / (std + 1.0)) ** 2
    beside = barlow_twins_loss(x, y, lambd=0.5, eps=1.0, convention="stable_pretraining")
    close(beside, (c - 1) ** 2 + (0.8 * c - 1) ** 2 + 0.5 * (0.6 * c) ** 2)


def test_identical_and_opposite_views():
    x = hadamard(8)[:, 1:]
    close(barlow_twins_loss(x, x, eps=0.0), 0.0)
    close(barlow_twins_loss(x, -x, eps=0.0), 4.0 * 7)
    close(barlow_twins_loss(x, x.roll(1, 1), eps=0.0, lambd=0.25), 7.0 + 0.25 * 7)


def test_perfectly_collinear_columns():
    """Every entry of C is 1."""
    x = double(9, 1).expand(9, 6)
    close(barlow_twins_loss(x, x, eps=0.0, lambd=0.5), 0.5 * 30)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_constant_views(convention):
    """Nothing correlates: D times the scale, and no gradient."""
    x = torch.full((6, 5), 0.375, dtype=torch.float64, requires_grad=True)
    loss = barlow_twins_loss(x, x, convention=convention)
    close(loss, 5 * CONVENTIONS[convention].scale)
    assert not torch.autograd.grad(loss, x)[0].any()


def test_linear_in_lambd_and_symmetric():
    x, y = double(9, 5), double(9, 5)
    on_diagonal, half, whole = (barlow_twins_loss(x, y, lambd=w) for w in (0.0, 0.5, 1.0))
    close(half - on_diagonal, (whole - on_diagonal) / 2)
    close(barlow_twins_loss(y, x, lambd=0.5), half)


def test_invariant_to_shift_and_scale():
    x, y = double(9, 5).requires_grad_(), double(9, 5)
    loss = barlow_twins_loss(x, y, eps=0.0)
    close(barlow_twins_loss(3.0 * x - 2.0, y, eps=0.0), loss, 1e-11)
    (grad,) = torch.autograd.grad(loss, x)
    close(grad.sum(dim=0), torch.zeros(5), 1e-11)
    close((grad * x.detach()).sum(dim=0), torch.zeros(5), 1e-11)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", [(5, 4), (4, 5)])
def test_sums_written_out(shape, convention):
    """Python floats and loops, no tensor algebra: the value and the closed-form gradient."""
    rows, dim = shape
    x, y = double(shape).requires_grad_(), double(shape).requires_grad_()
    rule, lambd = CONVENTIONS[convention], 0.3
    outcome = differentiate(
        lambda x, y: barlow_twins_loss(x, y, lambd=lambd, eps=0.2, convention=convention), x, y
    )
    eps, std_eps = (0.0, 0.2) if rule.eps_on_std else (0.2, 0.0)
    degrees = rows - 1 if rule.unbiased else rows

    def standardised(values):
        z, inverse, slope = [[0.0] * dim for _ in range(rows)], [], []
        for j in range(dim):
            mean = sum(values[n][j] for n in range(rows)) / rows
            scatter = sum((values[n][j] - mean) ** 2 for n in range(rows))
            root = math.sqrt(scatter / degrees + eps)
            inverse.append(1 / (root + std_eps))
            slope.append((root + std_eps) / (root * degrees))
            for n in range(rows):
                z[n][j] = (values[n][j] - mean) * inverse[j]
        return z, inverse, slope

    first, second = standardised(x.tolist()), standardised(y.tolist())
    c = [
        [sum(first[0][n][i] * second[0][n][j] for n in range(rows)) / rows for j in range(dim)]
        for i in range(dim)
    ]
    loss = sum(
        (c[i][j] - 1) ** 2 if i == j else lambd * c[i][j] ** 2
        for i in range(dim)
        for j in range(dim)
    )
    close(outcome.values[0], rule.scale * loss)
    by_c = [
        [2 * (c[i][j] - 1) if i == j else 2 * lambd * c[i][j] for j in range(dim)]
        for i in range(dim)
    ]
    for (z, inverse, slope), other, by, grad in (
        (first, second[0], by_c, outcome.gradients[0]),
        (second, first[0], list(zip(*by_c, strict=True)), outcome.gradients[1]),
    ):
        for i in range(dim):
            g = [sum(other[n][j] * by[i][j] for j in range(dim)) / rows for n in range(rows)]
            radial = sum(g[n] * z[n][i] for n in range(rows))
            for n in range(rows):
                expected = inverse[i] * (g[n] - sum(g) / rows - slope[i] * radial * z[n][i])
                close(grad[n, i], rule.scale * expected, 1e-11)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", [(5, 4), (4, 5)])
def test_finite_differences(shape, convention):
    x, y = double(shape).requires_grad_(), double(shape).requires_grad_()
    loss = BarlowTwinsLoss(0.3, convention=convention)
    assert gradcheck(loss, (x, y))
    assert gradgradcheck(loss, (x, y))
