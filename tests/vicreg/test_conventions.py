"""Tier 1: each published convention, restated here from its source's definition, view by view.

Nothing below shares code or structure with the library: every function is the source's loss in
full, with its own averaging, normaliser and default weights.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss

from tests.helpers.tolerances import SAME_FORMULA, differentiate, relative_error
from vicreg_kernels import VICRegLoss, vicreg_loss, vicreg_terms
from vicreg_kernels.vicreg.conventions import CONVENTIONS

SHAPES = [(2, 3), (5, 3), (4, 9), (16, 16), (32, 64), (65, 17)]
POSITIONS = [(6, 4, 5), (5, 3, 8), (6, 2, 3, 4), (4, 2, 2, 7), (5, 1, 6)]


def hinge(z):
    """Shortfall of each dimension's deviation from 1: [D]."""
    return (1.0 - (torch.var(z, dim=0, correction=1) + 1e-4).sqrt()).clamp(min=0.0)


def off_diagonal_squares(z):
    """Sum of the squared entries of the sample covariance off its diagonal."""
    covariance = torch.cov(z.T).reshape(z.shape[1], z.shape[1])
    upper = torch.triu(covariance, diagonal=1)
    return 2.0 * (upper * upper).sum()


def vicreg(x, y, weights=(25.0, 25.0, 1.0)):
    """The authors' script: half of each view's hinge, both covariances, per dimension."""
    invariance = mse_loss(x, y)
    variance = hinge(x).mean() / 2 + hinge(y).mean() / 2
    covariance = (off_diagonal_squares(x) + off_diagonal_squares(y)) / x.shape[1]
    return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


def vicregl(x, y, weights=(25.0, 25.0, 1.0)):
    """Global loss of two views, and, for maps [B, ..., D], the local loss of one matching: the
    statistics of each location over the batch; every term a mean over views and locations.
    """
    invariance = mse_loss(x, y)
    variance, covariance = [], []
    for view in (x, y):
        for location in view.reshape(len(view), -1, view.shape[-1]).unbind(dim=1):
            variance.append(hinge(location).mean())
            covariance.append(off_diagonal_squares(location) / view.shape[-1])
    terms = invariance, sum(variance) / len(variance), sum(covariance) / len(covariance)
    return sum(w * term for w, term in zip(weights, terms, strict=True))


def eb_jepa(x, y, weights=(1.0, 1.0, 80.0)):
    """Both hinges in full; the mean over the D(D - 1) entries. Weights: its ResNet recipe."""
    dim = x.shape[1]
    variance = hinge(x).mean() + hinge(y).mean()
    covariance = sum(off_diagonal_squares(z) / (dim * dim - dim) for z in (x, y))
    return weights[0] * mse_loss(x, y) + weights[1] * variance + weights[2] * covariance


def solo_learn(x, y, weights=(25.0, 25.0, 1.0)):
    """Both hinges in full; the covariance per dimension."""
    dim = x.shape[1]
    variance = hinge(x).mean() + hinge(y).mean()
    covariance = off_diagonal_squares(x) / dim + off_diagonal_squares(y) / dim
    return weights[0] * mse_loss(x, y) + weights[1] * variance + weights[2] * covariance


def stable_pretraining(x, y, weights=(25.0, 25.0, 1.0)):
    """A regulariser of one view, with half its hinge, applied to each."""

    def regulariser(z):
        return weights[1] * hinge(z).mean() / 2 + weights[2] * off_diagonal_squares(z) / z.shape[1]

    return weights[0] * mse_loss(x, y) + regulariser(x) + regulariser(y)


def lightly(x, y, weights=(25.0, 25.0, 1.0)):
    """The mean hinge of the two views, the sum of their covariances; [B, ..., D] per position."""
    dim = x.shape[-1]
    variance = 0.0
    covariance = 0.0
    for view in (x, y):
        positions = view.reshape(len(view), -1, dim)
        count = positions.shape[1]
        for p in range(count):
            variance = variance + 0.5 * hinge(positions[:, p]).sum() / (dim * count)
            covariance = covariance + off_diagonal_squares(positions[:, p]) / dim / count
    return weights[0] * mse_loss(x, y) + weights[1] * variance + weights[2] * covariance


def pytorch_metric_learning(x, y, weights=(25.0, 25.0, 1.0)):
    """A mean over samples of the squared distance per dimension; half hinges, each averaged."""
    invariance = ((x - y) ** 2).mean(dim=1).mean()
    variance = (hinge(x) / 2).mean() + (hinge(y) / 2).mean()
    covariance = (off_diagonal_squares(x) + off_diagonal_squares(y)) / x.shape[1]
    return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


PUBLISHED = {
    f.__name__: f
    for f in (
        vicreg,
        vicregl,
        eb_jepa,
        solo_learn,
        stable_pretraining,
        lightly,
        pytorch_metric_learning,
    )
}
TAKES_POSITIONS = ("vicregl", "lightly")


def two_views(shape):
    """Correlated float64 views, some dimensions on either side of the margin."""
    scales = torch.linspace(0.3, 2.0, shape[-1], dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64) * scales
    x = x + 0.3 * x.roll(1, -1)
    y = x + 0.5 * torch.randn(shape, dtype=torch.float64) + 2.0
    return x.requires_grad_(), y.requires_grad_()


def assert_same(ours, theirs, x, y):
    actual, expected = differentiate(ours, x, y), differentiate(theirs, x, y)
    assert relative_error(actual.values[0], expected.values[0]) < SAME_FORMULA
    for mine, yours in zip(actual.gradients, expected.gradients, strict=True):
        assert relative_error(mine, yours) < SAME_FORMULA


def test_every_convention_is_tested():
    assert set(PUBLISHED) == set(CONVENTIONS)
    assert {name for name, rule in CONVENTIONS.items() if rule.positions} == set(TAKES_POSITIONS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_value_and_gradient(name, shape):
    x, y = two_views(shape)
    assert_same(lambda x, y: vicreg_loss(x, y, convention=name), PUBLISHED[name], x, y)


@pytest.mark.parametrize("name", PUBLISHED)
def test_given_weights(name):
    x, y = two_views((9, 7))
    weights = (0.7, 3.0, 11.0)
    module = VICRegLoss(*weights, convention=name)
    assert_same(module, lambda x, y: PUBLISHED[name](x, y, weights), x, y)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_term_in_the_source_scaling(name):
    x, y = two_views((9, 7))
    terms = vicreg_terms(x, y, convention=name)
    for k in range(3):
        alone = tuple(float(i == k) for i in range(3))
        assert relative_error(terms[1 + k], PUBLISHED[name](x, y, alone)) < SAME_FORMULA


@pytest.mark.parametrize("shape", POSITIONS)
@pytest.mark.parametrize("name", TAKES_POSITIONS)
def test_positions(name, shape):
    """[B, P, D] and [B, H, W, D]."""
    x, y = two_views(shape)
    assert_same(lambda x, y: vicreg_loss(x, y, convention=name), PUBLISHED[name], x, y)


def test_conventions_differ():
    """The seven losses fall into four values: a test that mixed two up would be seen."""
    x, y = two_views((9, 7))
    values = {name: round(vicreg_loss(x, y, convention=name).item(), 9) for name in PUBLISHED}
    same = values["vicreg"]
    assert values["stable_pretraining"] == values["lightly"] == same
    assert values["pytorch_metric_learning"] == same
    others = {values[name] for name in ("vicregl", "eb_jepa", "solo_learn")}
    assert len(others | {same}) == 4


# The peers' own classes, where they are installed (an optional extra).


def lightly_class():
    """lightly's class from its own file: its package __init__ wants torchvision."""
    pytest.importorskip("lightly.utils.dist", reason="lightly is not installed")
    path = Path(sys.modules["lightly"].__file__).parent / "loss" / "vicreg_loss.py"
    spec = importlib.util.spec_from_file_location("lightly_vicreg_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VICRegLoss


@pytest.mark.parametrize("shape", SHAPES + POSITIONS)
def test_lightly_itself(shape):
    x, y = two_views(shape)
    assert_same(lambda x, y: vicreg_loss(x, y, convention="lightly"), lightly_class()(), x, y)


@pytest.mark.parametrize("shape", SHAPES)
def test_pytorch_metric_learning_itself(shape):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.VICRegLoss()
    x, y = two_views(shape)
    assert_same(
        lambda x, y: vicreg_loss(x, y, convention="pytorch_metric_learning"),
        lambda x, y: theirs(x, ref_emb=y),
        x,
        y,
    )
