"""Tier 1: the reference against closed forms, sums written out by hand, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.helpers import shapes
from tests.helpers.tolerances import SAME_FORMULA, differentiate
from vicreg_kernels import VCRegLoss, VICRegLoss, variance_covariance, vicreg_loss, vicreg_terms

# Means (1, 1), scatters (2, 2), and z_0 . z_1 = 1 about the means.
WORKED = [[0.0, 0.0], [1.0, 2.0], [2.0, 1.0]]
SETTINGS = [(True, "d"), (True, "d(d-1)"), (False, "d"), (False, "d(d-1)")]


def double(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(actual, expected) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=SAME_FORMULA, atol=SAME_FORMULA)


def hadamard(order: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


def test_worked_example_values():
    z = double(WORKED)
    variance, covariance = variance_covariance(z, margin=2.0, eps=0.21)
    close(variance, 2.0 - math.sqrt(1.21))
    close(covariance, 2 * 0.5**2 / 2)
    variance, covariance = variance_covariance(z, margin=2.0, eps=0.0, unbiased=False)
    close(variance, 2.0 - math.sqrt(2 / 3))
    close(covariance, 2 * (1 / 3) ** 2 / 2)
    terms = vicreg_terms(z, z + 1.0, margin=2.0, eps=0.0)
    close(torch.stack(terms), [25 * 1.0 + 25 * 1.0 + 0.5, 1.0, 1.0, 0.5])


def test_worked_example_gradients():
    z = double(WORKED).requires_grad_()
    variance, covariance = variance_covariance(z, margin=2.0, eps=0.0)
    (by_variance,) = torch.autograd.grad(variance, z, retain_graph=True)
    (by_covariance,) = torch.autograd.grad(covariance, z)
    close(by_variance, -(double(WORKED) - 1.0) / 4)
    close(by_covariance, [[-0.5, -0.5], [0.5, 0.0], [0.0, 0.5]])
    shifted = (double(WORKED) + 1.0).requires_grad_()
    invariance = vicreg_terms(z, shifted).invariance
    by_x, by_y = torch.autograd.grad(invariance, (z, shifted))
    close(by_x, double([[-1 / 3] * 2] * 3))
    close(by_y, double([[1 / 3] * 2] * 3))


def test_orthogonal_columns_have_no_covariance():
    z = (hadamard(8)[:, 1:] * torch.arange(1.0, 8.0, dtype=torch.float64)).requires_grad_()
    _, covariance = variance_covariance(z)
    assert covariance.item() == 0.0
    assert not torch.autograd.grad(covariance, z)[0].any()


@pytest.mark.parametrize(("normalizer", "expected"), [("d", 4 / 3), ("d(d-1)", 4 / 6)])
def test_two_identical_columns(normalizer, expected):
    """Columns of variance v, v and an orthogonal third: the sum of squares is 2 v^2."""
    h = hadamard(4) * math.sqrt(3 / 4)  # columns of unbiased variance 1
    z = torch.stack([h[:, 1], h[:, 1], h[:, 2]], dim=1) * 2**0.25  # v^2 = 2
    close(variance_covariance(z, covariance_normalizer=normalizer)[1], expected)


@pytest.mark.parametrize("margin", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("eps", [1e-4, 0.09])
def test_constant_embeddings(margin, eps):
    z = torch.full((6, 5), 0.375, dtype=torch.float64, requires_grad=True)
    variance, covariance = variance_covariance(z, margin=margin, eps=eps)
    close(variance, margin - math.sqrt(eps))
    assert covariance.item() == 0.0
    assert not torch.autograd.grad(variance + covariance, z)[0].any()


def test_hinge_is_flat_above_the_margin():
    z = (10 * torch.randn(9, 4, dtype=torch.float64)).requires_grad_()
    variance, _ = variance_covariance(z, margin=0.1)
    assert variance.item() == 0.0
    assert not torch.autograd.grad(variance, z)[0].any()


def test_one_dimension_has_no_covariance():
    z = torch.randn(5, 1, dtype=torch.float64)
    assert variance_covariance(z)[1].item() == 0.0


@pytest.mark.parametrize(("unbiased", "normalizer"), SETTINGS)
@pytest.mark.parametrize("shape", [(5, 4), (4, 5)])
def test_sums_written_out(shape, unbiased, normalizer):
    """Python floats and loops, no tensor algebra: values and the closed-form gradient."""
    rows, dim = shape
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    margin, eps = 0.8, 0.01
    variance, covariance = variance_covariance(
        z, margin=margin, eps=eps, unbiased=unbiased, covariance_normalizer=normalizer
    )
    (grad,) = torch.autograd.grad(2.0 * variance - 3.0 * covariance, z)

    count = rows - 1 if unbiased else rows
    scale = 1 / dim if normalizer == "d" else 1 / (dim * (dim - 1))
    values = z.tolist()
    means = [sum(values[n][j] for n in range(rows)) / rows for j in range(dim)]
    centred = [[values[n][j] - means[j] for j in range(dim)] for n in range(rows)]
    products = [
        [sum(centred[n][i] * centred[n][j] for n in range(rows)) for j in range(dim)]
        for i in range(dim)
    ]
    std = [math.sqrt(products[j][j] / count + eps) for j in range(dim)]
    assert min(std) < margin < max(std), "both branches of the hinge"
    close(variance, sum(max(0.0, margin - s) for s in std) / dim)
    pairs = [(i, j) for i in range(dim) for j in range(dim) if i != j]
    close(covariance, scale * sum((products[i][j] / count) ** 2 for i, j in pairs))
    expected = [
        [
            2.0 * (-centred[n][j] / (count * std[j] * dim) if std[j] < margin else 0.0)
            - 3.0
            * scale
            * 4
            / count**2
            * sum(centred[n][i] * products[i][j] for i in range(dim) if i != j)
            for j in range(dim)
        ]
        for n in range(rows)
    ]
    close(grad, expected)


@pytest.mark.parametrize("shape", [(6, 3), (3, 6)])
def test_invariants_of_the_terms(shape):
    """Shifts and row order change nothing; the covariance is homogeneous of degree four."""
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    variance, covariance = variance_covariance(z)
    for other in (z + 7.0, z.flip(0), z.flip(1), -z):
        torch.testing.assert_close(
            variance_covariance(other), (variance, covariance), rtol=1e-11, atol=0
        )
    (grad,) = torch.autograd.grad(covariance, z, retain_graph=True)
    close((grad * z).sum() / covariance.detach(), 4.0)
    (both,) = torch.autograd.grad(variance + covariance, z)
    assert both.sum(dim=0).abs().max() < 1e-14 * both.abs().sum()
    close(variance_covariance(3 * z.detach())[1] / covariance.detach(), 81.0)


@pytest.mark.parametrize(("unbiased", "normalizer"), SETTINGS)
def test_groups_are_averaged(unbiased, normalizer):
    z = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)

    def function(z):
        return variance_covariance(z, unbiased=unbiased, covariance_normalizer=normalizer)

    together = differentiate(function, z, cotangents=(0.7, 1.3))
    alone = [
        differentiate(function, group.detach().requires_grad_(), cotangents=(0.7, 1.3))
        for group in z
    ]
    for k in range(2):
        close(together.values[k], torch.stack([a.values[k] for a in alone]).mean())
    close(together.gradients[0], torch.stack([a.gradients[0] for a in alone]) / 4)


@pytest.mark.parametrize("alone", range(3))
def test_each_term_alone(alone):
    """With one weight the loss is that term times the weight, and so is its gradient."""
    x, y = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = [0.0, 0.0, 0.0]
    weights[alone] = 1.75
    names = ("invariance_weight", "variance_weight", "covariance_weight")
    terms = vicreg_terms(x, y)
    loss = vicreg_loss(x, y, **dict(zip(names, weights, strict=True)))
    close(loss, 1.75 * terms[1 + alone])
    expected = torch.autograd.grad(1.75 * terms[1 + alone], (x, y))
    for actual, wanted in zip(torch.autograd.grad(loss, (x, y)), expected, strict=True):
        close(actual, wanted)


def test_loss_is_the_weighted_sum():
    x, y = (torch.randn(5, 4, dtype=torch.float64) for _ in range(2))
    given = dict(invariance_weight=0.3, variance_weight=2.0, covariance_weight=-1.5)
    loss, invariance, variance, covariance = vicreg_terms(x, y, **given)
    close(loss, 0.3 * invariance + 2.0 * variance - 1.5 * covariance)
    close(vicreg_loss(x, y, **given), loss)
    default = vicreg_terms(x, y)
    close(torch.stack(default[1:]), torch.stack([invariance, variance, covariance]))
    close(vicreg_loss(x, y, variance_weight=0.0), 25 * invariance + covariance)


def test_modules_are_the_functions():
    x, y = (torch.randn(6, 5, dtype=torch.float64) for _ in range(2))
    module = VICRegLoss(3.0, 2.0, 0.5, margin=1.5, eps=1e-3, convention="solo_learn")
    close(
        module(x, y),
        vicreg_loss(
            x,
            y,
            invariance_weight=3.0,
            variance_weight=2.0,
            covariance_weight=0.5,
            margin=1.5,
            eps=1e-3,
            convention="solo_learn",
        ),
    )
    close(VICRegLoss()(x, y), vicreg_loss(x, y))
    given = dict(margin=1.5, eps=1e-3, unbiased=False, covariance_normalizer="d(d-1)")
    variance, covariance = variance_covariance(x, **given)
    close(VCRegLoss(3.0, 0.25, **given)(x), 3.0 * variance + 0.25 * covariance)
    variance, covariance = variance_covariance(x)
    close(VCRegLoss()(x), 25.0 * variance + covariance)


@pytest.mark.parametrize("shape", [(4, 3), (3, 5)])
@pytest.mark.parametrize("term", range(4))
def test_gradcheck_of_each_term(shape, term):
    """First and second derivatives, both views; half of the columns above the margin."""
    x, y = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    x[:, ::2] *= 4
    y[:, 1::2] *= 4

    def function(x, y):
        return vicreg_terms(x, y, margin=1.7, backend="reference")[term]

    views = (x.requires_grad_(), y.requires_grad_())
    assert gradcheck(function, views)
    assert gradgradcheck(function, views)


@pytest.mark.parametrize(("unbiased", "normalizer"), SETTINGS)
@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (2, 4, 3)])
def test_gradcheck_of_variance_covariance(shape, unbiased, normalizer):
    z = torch.randn(shape, dtype=torch.float64)
    z[..., ::2] *= 4

    def function(z):
        return variance_covariance(
            z, margin=1.7, unbiased=unbiased, covariance_normalizer=normalizer
        )

    assert gradcheck(function, z.requires_grad_())
    assert gradgradcheck(function, z)


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_memory_layout_does_not_matter(layout):
    x = shapes.LAYOUTS[layout](6, 4, dtype=torch.float64)
    y = torch.randn(6, 4, dtype=torch.float64)
    close(torch.stack(vicreg_terms(x, y)), torch.stack(vicreg_terms(x.clone().contiguous(), y)))
