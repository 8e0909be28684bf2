"""SIGReg as each published implementation computes it, in float64: value and gradient; across two
ranks, where one of them goes wrong; and the packages themselves where they are installed.

The formulas are written down here from the sources' definitions, as plainly as they can be.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.helpers.tolerances import SAME_FORMULA, relative_error
from vicreg_kernels.sigreg import LeJEPALoss, sigreg_directions, sigreg_loss

N, D, M = 12, 5, 30


def unit_columns(generator=None, dtype=torch.float64, slices=M):
    a = torch.randn(D, slices, generator=generator, dtype=dtype)
    return a / a.norm(dim=0)


def half_line(z, a, rows=None, means=None):
    """lejepa's, LeWM's and lightly's: 17 knots on [0, 3], inner weights twice the outer ones, times
    the rows. means: what becomes of the mean cosines and sines among ranks.
    """
    t = torch.linspace(0, 3, 17, dtype=z.dtype)
    normal = torch.exp(-0.5 * t**2)
    weights = normal * (3 / 16) * torch.cat((torch.ones(1), torch.full((15,), 2.0), torch.ones(1)))
    angles = (z @ a)[..., None] * t  # [..., N, M, K]
    cosines, sines = angles.cos().mean(dim=-3), angles.sin().mean(dim=-3)
    if means is not None:
        cosines, sines = means(cosines), means(sines)
    squares = (cosines - normal) ** 2 + sines**2
    return (rows or z.shape[-2]) * (squares * weights).sum(dim=-1).mean()


def whole_line(z, a):
    """eb_jepa's: 10 knots on [-3, 3], the complex mean, no factor."""
    t = torch.linspace(-3, 3, 10, dtype=z.dtype)
    normal = torch.exp(-0.5 * t**2)
    mean = torch.exp(1j * (z @ a)[..., None] * t).mean(dim=-3)
    return torch.trapezoid(normal * (mean - normal).abs() ** 2, t, dim=-1).mean()


def outcome(loss, z):
    z = z.detach().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


def assert_same(ours, theirs, z, bound=SAME_FORMULA):
    for mine, peers in zip(outcome(ours, z), outcome(theirs, z), strict=True):
        assert relative_error(mine, peers) < bound


@pytest.mark.parametrize(
    ("convention", "shape", "formula"),
    [
        ("lejepa", (N, D), half_line),
        ("lejepa", (3, N, D), half_line),
        ("lightly", (3, N, D), half_line),
        ("lewm", (4, N, D), half_line),  # [T, B, D]: a statistic per time step
        ("eb_jepa", (N, D), whole_line),
        ("eb_jepa", (2, N, D), whole_line),  # the mean of its two views'
        ("stable_pretraining", (N, D), half_line),
        ("stable_pretraining", (3, N, D), lambda z, a: half_line(z.reshape(-1, D), a)),
    ],
)
def test_formulas(convention, shape, formula):
    z, a = torch.randn(shape, dtype=torch.float64), unit_columns()
    assert_same(
        lambda z: sigreg_loss(z, directions=a, convention=convention), lambda z: formula(z, a), z
    )


def test_lejepa_losses():
    """lejepa's recipe: all views' centre, convex; stable-pretraining: the global views', a sum, its
    views pooled; LeWM: the prediction's squared error and 0.09 of SIGReg per time step.
    """
    z, target = torch.randn(4, N, D).double(), torch.randn(N, 3, D).double()
    a = sigreg_directions(D, M, backend="reference").double()

    def spread(z, views):
        return ((z[:views].mean(0) - z) ** 2).mean()

    recipe = LeJEPALoss(0.02, slices=M)
    assert_same(
        lambda z: recipe(z, step=0),
        lambda z: 0.98 * spread(z, 4) + 0.02 * half_line(z, a),
        z,
    )
    pooled = LeJEPALoss(0.02, weighting="sum", slices=M, convention="stable_pretraining")
    assert_same(
        lambda z: pooled(z, 2, step=0),
        lambda z: spread(z, 2) + 0.02 * half_line(z.reshape(-1, D), a),
        z,
    )
    world = LeJEPALoss(0.09, weighting="sum", slices=M, convention="lewm")
    assert_same(
        lambda z: world(z, predicted=z[:3].transpose(0, 1), target=target, step=0),
        lambda z: ((z[:3].transpose(0, 1) - target) ** 2).mean() + 0.09 * half_line(z, a),
        z,
    )


@pytest.mark.parametrize("ranks", [2, 8])
def test_across_ranks(ranks):
    """Ranks simulated in one process: each rank's loss, and the average of their gradients, which
    is what DistributedDataParallel hands on.

    lejepa and lightly reduce the means differentiably: the whole batch's loss and gradient.
    stable-pretraining reduces into a copy that is dropped: each rank's loss is the ranks times its
    own rows' statistic. Its gradient is wrong by more than its own size.
    """
    z, a = torch.randn(ranks * N, D, dtype=torch.float64), unit_columns(slices=256)
    loss, gradient = outcome(lambda z: half_line(z, a), z)
    assert_same(lambda z: sigreg_loss(z, directions=a), lambda z: half_line(z, a), z)

    leaf = z.clone().requires_grad_()
    parts = leaf.split(N)
    t = torch.linspace(0, 3, 17, dtype=z.dtype)
    everyone = [(part @ a)[..., None] * t for part in parts]
    reduced = {
        "cosines": torch.stack([angles.cos().mean(dim=0) for angles in everyone]).mean(dim=0),
        "sines": torch.stack([angles.sin().mean(dim=0) for angles in everyone]).mean(dim=0),
    }
    order = iter(("cosines", "sines"))
    right = half_line(parts[0], a, rows=ranks * N, means=lambda _: reduced[next(order)])
    assert relative_error(right, loss) < SAME_FORMULA
    assert relative_error(torch.autograd.grad(right, leaf)[0], gradient) < SAME_FORMULA

    dropped = [half_line(part, a, rows=ranks * N) for part in parts]
    # The gradient of rank r's loss by its rows, averaged: a row belongs to one rank.
    averaged = torch.autograd.grad(sum(dropped) / ranks, leaf)[0]
    assert relative_error(averaged, gradient) > 0.8
    assert min(own.item() for own in dropped) > 1.3 * loss.item()


def installed(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not installed")


def test_lejepa_package():
    lejepa = installed("lejepa")
    theirs = lejepa.multivariate.SlicingUnivariateTest(lejepa.univariate.EppsPulley(), M).double()
    a = unit_columns(torch.Generator().manual_seed(0), torch.float32).double()
    z = torch.randn(N, D, dtype=torch.float64)
    theirs.global_step.zero_()
    their_loss = theirs(z.float())
    assert relative_error(their_loss, sigreg_loss(z, directions=a)) < 1e-5


def test_lightly_package():
    lightly = installed("lightly.loss.lejepa_loss")
    z = torch.randn(2, N, D, dtype=torch.float64)

    def theirs(z):
        torch.manual_seed(3)
        return lightly.SIGReg(num_vectors=M).double()(z)

    torch.manual_seed(3)
    a = unit_columns()
    assert_same(lambda z: sigreg_loss(z, directions=a, convention="lightly"), theirs, z, bound=1e-6)


def test_stable_pretraining_package():
    package = installed("stable_pretraining.methods.lejepa")
    theirs = package.SlicedEppsPulley(num_slices=M).double()
    a = unit_columns(torch.Generator().manual_seed(0), torch.float32)
    z = torch.randn(N, D)
    ours = sigreg_loss(z, directions=a, convention="stable_pretraining")
    assert relative_error(theirs(z), ours) < 1e-5


def test_jepa_science_package():
    package = installed("jepa_science")
    z = torch.randn(N, D, dtype=torch.float64)
    a = unit_columns(torch.Generator().manual_seed(3))

    def theirs(z):
        return package.sigreg_loss(z, M, generator=torch.Generator().manual_seed(3))

    assert_same(lambda z: sigreg_loss(z, directions=a), theirs, z)
