"""Cases of test_across_ranks.py: VICRegL, in every way of matching."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from tests.library.test_across_ranks import FEATURES, ROWS, Case
from vicreg_kernels.vicregl import VICRegLLoss, vicregl_terms

SHAPES = ((3, 4), (4, 3), (2, 2))  # of the maps: two large views and a small one


def encoder(dim):
    """Without a last bias: the centring makes its gradient zero, and its error all of it."""
    return lambda: nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, dim, bias=False))


def batch(views):
    """Features and places of the positions of each view: [ROWS, H, W, FEATURES] and [..., 2]."""

    def build():
        base = torch.randn(ROWS, 1, 1, FEATURES)
        maps = [base + torch.randn(ROWS, *shape, FEATURES) for shape in SHAPES[:views]]
        return *maps, *(torch.rand(ROWS, *shape, 2) for shape in SHAPES[:views])

    return build


def inputs(model, batch):
    views = len(batch) // 2
    maps = [model(z) for z in batch[:views]]
    return [z.mean(dim=(1, 2)) for z in maps], maps, batch[views:]


def loss(model, batch, group, **settings):
    return VICRegLLoss(num_matches=(5, 2), process_group=group, **settings)(*inputs(model, batch))


def weighed_terms(model, batch, group):
    terms = vicregl_terms(
        *inputs(model, batch), num_matches=(5, 2), margin=1.5, alpha=0.3, process_group=group
    )
    weights = (0.5, 2.0, 1.0, -0.1, 0.7, 3.0, 0.2)
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


WIDE, NARROW = 2 * ROWS + 3, ROWS - 4
CASES = {
    "published": Case(loss, batch(3), encoder(WIDE)),
    "published-covariance": Case(loss, batch(2), encoder(NARROW)),
    "lightly": Case(
        partial(loss, l2_all_matches=False, match_order="distance"), batch(2), encoder(NARROW)
    ),
    "fast": Case(partial(loss, fast_vc_reg=True), batch(3), encoder(WIDE)),
    "terms": Case(weighed_terms, batch(3), encoder(NARROW)),
    "maps alone": Case(partial(loss, alpha=0.0), batch(2), encoder(NARROW)),
    "reference": Case(partial(loss, backend="reference"), batch(3), encoder(NARROW)),
}
