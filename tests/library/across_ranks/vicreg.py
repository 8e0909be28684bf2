"""Cases of test_across_ranks.py: VICReg on both sides of N = D, in every convention."""

from __future__ import annotations

from functools import partial

from torch import nn

from tests.library.test_across_ranks import FEATURES, ROWS, Case, views
from vicreg_kernels import VCRegLoss, VICRegLoss, vicreg_loss, vicreg_terms
from vicreg_kernels.vicreg.conventions import CONVENTIONS

WIDE, NARROW = 2 * ROWS + 3, ROWS - 4


def encoder(dim):
    """Without a last bias: the centring makes its gradient zero, and its error all of it."""
    return lambda: nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, dim, bias=False))


def loss(model, batch, group, **settings):
    x, y = (model(z) for z in batch)
    return vicreg_loss(x, y, process_group=group, **settings)


def weighed_terms(model, batch, group):
    x, y = (model(z) for z in batch)
    terms = vicreg_terms(x, y, process_group=group, margin=1.5, convention="eb_jepa")
    return 0.5 * terms.loss + 2.0 * terms.invariance + terms.variance - 0.1 * terms.covariance


def one_view(model, batch, group, **settings):
    """[N, P, D] -> grouped [P, N, D]."""
    z = model(batch[0]).transpose(0, 1)
    return VCRegLoss(process_group=group, **settings)(z)


def many_views(model, batch, group, **settings):
    return VICRegLoss(process_group=group, **settings)([model(z) for z in batch])


def both_sides(name, function, batch):
    return {
        f"{name}-gram": Case(function, batch, encoder(WIDE)),
        f"{name}-covariance": Case(function, batch, encoder(NARROW)),
    }


# Conventions are scalings: each on one side.
CASES = {
    **{
        name: Case(partial(loss, convention=name), views(), encoder((WIDE, NARROW)[i % 2]))
        for i, name in enumerate(CONVENTIONS)
    },
    **both_sides("terms", weighed_terms, views()),
    **both_sides("positions", partial(loss, convention="lightly"), views(2, 3)),
    **both_sides("grouped", partial(one_view, unbiased=False), views(1, 3)),
    **both_sides("three views", many_views, views(3)),
    "three views, positions": Case(
        partial(many_views, convention="lightly"), views(3, 2), encoder(NARROW)
    ),
    "reference": Case(partial(loss, backend="reference"), views(), encoder(WIDE)),
    "square": Case(loss, views(), encoder(ROWS)),
    "one dimension": Case(loss, views(), encoder(1)),
}
