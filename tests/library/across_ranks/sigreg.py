"""Cases of test_across_ranks.py: SIGReg and LeJEPA in every convention."""

from __future__ import annotations

from functools import partial

from tests.library.test_across_ranks import Case, encoder, views
from vicreg_kernels.sigreg import LeJEPALoss, SIGRegLoss, sigreg_loss
from vicreg_kernels.sigreg.conventions import CONVENTIONS

SLICES, DIM = 40, 7


def one_view(model, batch, group, **settings):
    settings = {"slices": SLICES, "step": 3, **settings}
    return sigreg_loss(model(batch[0]), process_group=group, **settings)


def grouped(model, batch, group, **settings):
    """[N, V, D] -> views [V, N, D]."""
    z = model(batch[0]).transpose(0, 1)
    return sigreg_loss(z, slices=SLICES, step=3, process_group=group, **settings)


def counting_module(model, batch, group):
    """The second step's directions; the rows are float32's, the sums of a module's two calls."""
    module = SIGRegLoss(SLICES, process_group=group, seed=-5)
    z = model(batch[0])
    return module(z) + 2.0 * module(0.5 * z)


def lejepa(model, batch, group, **settings):
    z = model(batch[0]).transpose(0, 1)
    return LeJEPALoss(slices=SLICES, process_group=group, **settings)(z, global_views=2)


def world_model(model, batch, group):
    """LeWM: the next embedding's prediction, here half of its own, and SIGReg per time step."""
    z = model(batch[0])
    loss = LeJEPALoss(0.09, weighting="sum", slices=SLICES, convention="lewm", process_group=group)
    return loss(z.transpose(0, 1), predicted=0.5 * z[:, :-1], target=z[:, 1:])


CASES = {
    **{
        name: Case(partial(one_view, convention=name), views(1), encoder(DIM))
        for name in CONVENTIONS
    },
    **{
        f"views of {name}": Case(partial(grouped, convention=name), views(1, 3), encoder(DIM))
        for name in ("lejepa", "stable_pretraining")
    },
    "unequal knots": Case(partial(one_view, knots=[0.0, 0.4, 1.1, 3.0]), views(1), encoder(DIM)),
    "reference": Case(partial(one_view, backend="reference"), views(1), encoder(DIM)),
    "module": Case(counting_module, views(1), encoder(DIM)),
    "convex": Case(partial(lejepa, weight=0.05), views(1, 3), encoder(DIM)),
    "sum": Case(partial(lejepa, weighting="sum"), views(1, 3), encoder(DIM)),
    "world model": Case(world_model, views(1, 4), encoder(DIM)),
}
