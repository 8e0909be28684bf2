"""Cases of test_across_ranks.py: Barlow Twins on both sides of N = D, in every convention."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch

from tests.library.across_ranks.vicreg import NARROW, WIDE, encoder
from tests.library.test_across_ranks import FEATURES, ROWS, Case
from vicreg_kernels.barlow import BarlowTwinsLoss
from vicreg_kernels.barlow.conventions import CONVENTIONS


def views():
    """Half of their variance shared: where more is, the gradient is a small difference, and one
    process's own float32 error against float64 passes the bound.
    """
    base = torch.randn(ROWS, FEATURES)
    return tuple(base + torch.randn_like(base) for _ in range(2))


def loss(model, batch, group, **settings):
    x, y = (model(z) for z in batch)
    return BarlowTwinsLoss(process_group=group, **settings)(x, y)


def case(dim, **settings):
    return Case(partial(loss, **settings), views, encoder(dim))


CASES = {
    **{name: case((WIDE, NARROW)[i % 2], convention=name) for i, name in enumerate(CONVENTIONS)},
    # The whole batch's own gradient in float32 is up to 1e-6 from float64's here.
    "gram": dataclasses.replace(case(WIDE, lambd=0.5), relative=2e-6),
    "correlation": case(NARROW, lambd=0.5),
    "square": case(ROWS, convention="monai"),
    "one dimension": case(1),
    "reference": case(WIDE, backend="reference"),
}
