"""Cases of test_across_ranks.py: the drop-in losses that take the batch of all ranks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tests.library.across_ranks import barlow
from tests.library.test_across_ranks import SPLITS, Case, encoder, views
from vicreg_kernels.compat import eb_jepa, lightly, solo_learn, stable_pretraining

DIM = 9
# lightly's losses want two rows on each rank.
TWO_ROWS = {ranks: tuple(s for s in splits if min(s) > 1) for ranks, splits in SPLITS.items()}


def two_views(model, batch, group, *, make):
    """group: True on the ranks, where every loss gathers, or None in one process."""
    return make(bool(group))(*(model(z) for z in batch))


def grouped(model, batch, group, *, make):
    """A statistic per view, on the same directions in every process."""
    torch.manual_seed(7)
    return make(bool(group))(torch.stack([model(z) for z in batch]))


def case(make, loss=two_views, batch=None, **settings) -> Case:
    return Case(partial(loss, make=make), batch or views(), encoder(DIM), **settings)


def lightly_sigreg(gathers: bool):
    return lightly.SIGReg(num_vectors=30, gather_distributed=gathers)


def sliced(gathers: bool):
    """Of all views as one sample."""
    statistic = stable_pretraining.SlicedEppsPulley(30)
    return lambda z: statistic(z.flatten(0, 1))


def bcs(gathers: bool):
    """SIGReg alone: the distance of views is that of a rank's own rows."""
    return lambda x, y: eb_jepa.BCS(30)(x, y)["bcs_loss"]


def vcreg(gathers: bool):
    return lambda x, y: stable_pretraining.VCRegLoss()(x)


def vicregl(gathers: bool):
    loss = lightly.VICRegLLoss(gather_distributed=gathers, num_matches=(2, 2))

    def run(x: Tensor, y: Tensor) -> Tensor:
        maps = [z[:, :8].unflatten(1, (2, 2, 2)) for z in (x, y)]
        grids = torch.arange(8.0).reshape(1, 2, 2, 2).expand(len(x), -1, -1, -1)
        return loss(list(zip((x, y), maps, strict=True)), [grids, grids.flip(1)]).squeeze()

    return run


CASES = {
    "lightly VICReg": case(lambda g: lightly.VICRegLoss(gather_distributed=g), splits=TWO_ROWS),
    "lightly Barlow": case(
        lambda g: lightly.BarlowTwinsLoss(gather_distributed=g), batch=barlow.views
    ),
    "lightly SIGReg": case(lightly_sigreg, grouped),
    "lightly VICRegL": case(vicregl, splits=TWO_ROWS),
    "solo-learn VICReg": case(lambda g: solo_learn.vicreg_loss_func),
    "solo-learn Barlow": case(lambda g: solo_learn.barlow_loss_func, batch=barlow.views),
    "stable-pretraining VICReg": case(lambda g: stable_pretraining.VICRegLoss()),
    "stable-pretraining VCReg": case(vcreg),
    "stable-pretraining Barlow": case(
        lambda g: stable_pretraining.BarlowTwinsLoss(), batch=barlow.views
    ),
    "stable-pretraining SIGReg": case(sliced, grouped),
    "eb_jepa BCS": case(bcs),
}
