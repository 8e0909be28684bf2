"""Tier 1: each published convention, restated here from its source's definition, and the packages
themselves where they are installed.

Nothing below shares code or structure with the library: every function is the source's loss in
full, with its own statistics and default weight.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.helpers.tolerances import SAME_FORMULA, differentiate, relative_error
from vicreg_kernels.barlow import BarlowTwinsLoss, barlow_twins_loss
from vicreg_kernels.barlow.conventions import CONVENTIONS

SHAPES = [(2, 3), (5, 3), (4, 9), (16, 16), (32, 64), (65, 17), (7, 1)]


def batch_norm(z):
    """What BatchNorm1d(affine=False) gives in training: biased variance, eps under the root."""
    module = torch.nn.BatchNorm1d(z.shape[1], affine=False, track_running_stats=False)
    return module.to(z.dtype)(z)


def redundancy(correlation, weight):
    """Entry by entry: the diagonal against 1, the rest against 0."""
    dim = len(correlation)
    weights = torch.full_like(correlation, weight).fill_diagonal_(1.0)
    target = torch.eye(dim, dtype=correlation.dtype)
    return (weights * (target - correlation) ** 2).sum()


def barlow_twins(x, y, lambd=0.0051):
    """The authors' script on one device."""
    return redundancy(torch.einsum("ni,nj->ij", batch_norm(x), batch_norm(y)) / len(x), lambd)


def lightly(x, y, lambd=5e-3):
    """Version 1.6: as the authors', each view normalised by itself."""
    return redundancy(batch_norm(x).mT.matmul(batch_norm(y)).div(len(x)), lambd)


def solo_learn(x, y, lambd=5e-3):
    """As the authors', the whole scaled down by forty."""
    return redundancy(batch_norm(x).mT @ (batch_norm(y) / len(x)), lambd) / 40


def stable_pretraining(x, y, lambd=5e-3):
    """Sample standard deviation, eps beside it, but the mean over N in the correlation."""

    def normal(z):
        return (z - z.mean(0)) / (torch.std(z, 0) + 1e-5)

    return redundancy(normal(x).T @ normal(y) / len(x), lambd)


def monai(x, y, lambd=5e-3):
    """The same with a smaller eps."""
    first, second = ((z - z.mean(0)) / (torch.std(z, 0) + 1e-6) for z in (x, y))
    return redundancy(first.T @ second / len(x), lambd)


PUBLISHED = {f.__name__: f for f in (barlow_twins, lightly, solo_learn, stable_pretraining, monai)}


def views(shape, scale=1.0):
    x = torch.randn(shape, dtype=torch.float64)
    y = x + 0.5 * torch.randn(shape, dtype=torch.float64)
    return [(scale * z).requires_grad_() for z in (x, y)]


def assert_same(function, published, x, y):
    actual, expected = differentiate(function, x, y), differentiate(published, x, y)
    for mine, theirs in zip(
        actual.values + actual.gradients, expected.values + expected.gradients, strict=True
    ):
        if len(x) == 2:  # z is +-1 whatever x is: the gradient is what eps and rounding leave
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
        else:
            assert relative_error(mine, theirs) <= SAME_FORMULA


def test_every_convention_is_restated():
    assert set(PUBLISHED) == set(CONVENTIONS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_value_and_gradient(name, shape):
    x, y = views(shape)
    assert_same(lambda x, y: barlow_twins_loss(x, y, convention=name), PUBLISHED[name], x, y)
    given = BarlowTwinsLoss(0.3, convention=name)
    assert_same(given, lambda x, y: PUBLISHED[name](x, y, 0.3), x, y)


@pytest.mark.parametrize("name", PUBLISHED)
def test_eps_matters_where_the_source_puts_it(name):
    """Embeddings so small that eps decides."""
    x, y = views((12, 5), scale=3e-4)
    assert_same(lambda x, y: barlow_twins_loss(x, y, convention=name), PUBLISHED[name], x, y)


@pytest.mark.parametrize("name", ["stable_pretraining", "monai"])
def test_collapsed_column_beside_std_eps(name):
    """torch.std's derivative at a constant column is 0, and so is ours."""
    x, y = views((12, 5))
    with torch.no_grad():
        x[:, 2] = 0.25
    assert_same(lambda x, y: barlow_twins_loss(x, y, convention=name), PUBLISHED[name], x, y)


def test_conventions_differ():
    x, y = views((12, 5))
    losses = {barlow_twins_loss(x, y, convention=name).item() for name in CONVENTIONS}
    assert len(losses) == len(CONVENTIONS)


def module_of(package: str, *path: str):
    """A file of an installed package by its path: importing the package may need torchvision."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    file = Path(spec.submodule_search_locations[0]).joinpath(*path)
    spec = importlib.util.spec_from_file_location(f"_{package}_barlow_twins", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed(name: str):
    if name == "lightly":
        return module_of("lightly", "loss", "barlow_twins_loss.py").BarlowTwinsLoss()
    if name == "solo_learn":
        return module_of("solo", "losses", "barlow.py").barlow_loss_func
    if name == "monai":
        return module_of("monai", "losses", "barlow_twins.py").BarlowTwinsLoss()
    losses = pytest.importorskip(
        "stable_pretraining.losses", exc_type=ImportError, reason="not installed"
    )
    return losses.BarlowTwinsLoss()


@pytest.mark.parametrize("name", ["lightly", "solo_learn", "stable_pretraining", "monai"])
def test_installed_package(name):
    peer = installed(name)
    x, y = (z.detach().float().requires_grad_() for z in views((24, 40)))
    actual = differentiate(lambda x, y: barlow_twins_loss(x, y, convention=name), x, y)
    expected = differentiate(peer, x, y)
    torch.testing.assert_close(actual.values, expected.values)
    torch.testing.assert_close(actual.gradients, expected.gradients, rtol=1e-4, atol=1e-6)
