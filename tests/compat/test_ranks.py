"""Two gloo ranks: the gradient of the peers that gather, and where theirs differs, why.

tests/library/test_across_ranks.py holds the same losses to one process with the whole batch.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from bench import peers
from tests.helpers import gloo
from tests.helpers.tolerances import relative_error

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)
ROWS, DIM, RANKS = 10, 6, 2


def lejepa(get):
    loss = get("LeJEPALoss")(gather_distributed=True, sigreg_num_vectors=30)
    return lambda x, y: loss(local_proj=x[None], global_proj=y[None])


def lightly_sigreg(get):
    loss = get("SIGReg")(num_vectors=30, gather_distributed=True)
    return lambda x, y: loss(torch.stack((x, y)))


def sliced(get):
    """The count of rank 0 counts."""
    loss = get("SlicedEppsPulley")(30)
    loss.global_step += dist.get_rank() if dist.is_initialized() else 0
    return lambda x, y: loss(torch.cat((x, y)))


# name -> (peer, loss of this rank's rows of two views)
LOSSES = {
    "lightly VICReg": ("lightly", lambda get: get("VICRegLoss")(gather_distributed=True)),
    "lightly Barlow": ("lightly", lambda get: get("BarlowTwinsLoss")(gather_distributed=True)),
    "lightly SIGReg": ("lightly", lightly_sigreg),
    "lightly LeJEPA": ("lightly", lejepa),
    "solo-learn VICReg": ("solo_learn", lambda get: get("vicreg_loss_func")),
    "solo-learn Barlow": ("solo_learn", lambda get: get("barlow_loss_func")),
    "stable-pretraining VICReg": ("stable_pretraining", lambda get: get("VICRegLoss")()),
    "stable-pretraining Barlow": ("stable_pretraining", lambda get: get("BarlowTwinsLoss")()),
    "stable-pretraining SIGReg": ("stable_pretraining", sliced),
    "eb_jepa BCS": ("eb_jepa", lambda get: lambda x, y: get("BCS")(30)(x, y)["bcs_loss"]),
}
# Their value on a rank has the invariance of its own rows; ours that of all rows, their mean.
MEAN = ("lightly VICReg", "solo-learn VICReg", "stable-pretraining VICReg")
# Theirs is of another matrix: of views that each rank standardises by its own rows.
LOCAL = ("lightly Barlow", "solo-learn Barlow", "stable-pretraining Barlow")
# Theirs is the statistic of a rank's own rows, times the ranks.
DROPPED = ("stable-pretraining SIGReg",)
# Theirs is that of one process, where ours is times the ranks: gloo's average is a sum, which
# autograd does not see, and a division, which it does.
DIVIDED = ("eb_jepa BCS",)


def rows(rank):
    """Float32: some peers take no other."""
    generator = torch.Generator().manual_seed(11 + rank)
    base = torch.randn(ROWS, DIM, generator=generator) * torch.linspace(0.5, 1.5, DIM)
    views = (base + 0.4 * torch.randn(ROWS, DIM, generator=generator) for _ in range(2))
    return [z.requires_grad_() for z in views]


def outcome(loss, rank):
    views = rows(rank)
    torch.manual_seed(5 + rank)  # where directions are drawn from it, rank 0's count
    value = loss(*views)
    return value.detach(), torch.autograd.grad(value, views)


def worker(rank, ranks):
    outcomes = {}
    for name, (peer, make) in LOSSES.items():
        outcomes[name, "ours"] = outcome(make(peers.ours(peer)), rank)
        with peers.importable(peer):
            try:
                outcomes[name, "theirs"] = outcome(make(peers.theirs(peer)), rank)
            except ImportError as error:
                outcomes[name, "theirs"] = str(error)
    return outcomes


@pytest.mark.parametrize("name", DROPPED)
def test_directions_are_those_of_rank_0(name):
    ranks = gloo.on_two("compat.test_ranks")
    x, y = (torch.cat(views) for views in zip(*map(rows, range(RANKS)), strict=True))
    peer, make = LOSSES[name]
    whole = make(peers.ours(peer))(x, y)
    for rank in ranks:
        torch.testing.assert_close(rank[name, "ours"][0], whole.detach())


@pytest.mark.parametrize("name", LOSSES)
def test_of_the_peer(name):
    ranks = gloo.on_two("compat.test_ranks")
    if isinstance(ranks[0][name, "theirs"], str):
        pytest.skip(f"{name}: {ranks[0][name, 'theirs']}")
    values = [rank[name, "ours"][0] for rank in ranks]
    theirs = [rank[name, "theirs"][0] for rank in ranks]
    factor = RANKS if name in DIVIDED else 1
    differences = [
        relative_error(mine, factor * slope)
        for rank in ranks
        for mine, slope in zip(rank[name, "ours"][1], rank[name, "theirs"][1], strict=True)
    ]
    if name in DROPPED + LOCAL:
        assert min(differences) > 0.01
        assert values[0] == values[1]
        return
    assert max(differences) < 1e-5
    if name in MEAN:
        assert values[0] == values[1]
        torch.testing.assert_close(values[0], sum(theirs) / RANKS, rtol=1e-5, atol=0.0)
    else:
        torch.testing.assert_close(values, theirs, rtol=1e-5, atol=0.0)
