"""Tier 1: VICRegL's reference against the published definition written out by loops, closed forms,
and finite differences.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.helpers.tolerances import SAME_FORMULA
from tests.vicregl.cases import MATCHES, SEVEN, VIEWS, WAYS, draw, outcome
from vicreg_kernels.vicregl import VICRegLLoss, op, reference, vicregl_loss, vicregl_terms


def nearest(from_, to):
    """For each row of from_, (distance, row, nearest row of to), in order of distance."""
    pairs = []
    for i, x in enumerate(from_.tolist()):
        distances = [math.dist(x, y) for y in to.tolist()]
        least = min(distances)
        pairs.append((least, i, distances.index(least)))
    return sorted(pairs)


def matched(own, other, places, other_places, count, order):
    """[B, count, C] twice: what is kept of own's matches, and their matches."""
    mine, theirs = [], []
    for b in range(own.shape[0]):
        kept = nearest(places[b].detach(), other_places[b].detach())[:count]
        if order == "position":
            kept = sorted(kept, key=lambda match: match[1])
        mine.append(torch.stack([own[b, i] for _, i, _ in kept]))
        theirs.append(torch.stack([other[b, j] for _, _, j in kept]))
    return torch.stack(mine), torch.stack(theirs)


def hinge_and_squares(z, margin, eps):
    """Of [B, D]: the mean hinge, and the off-diagonal squares over D."""
    std = (torch.var(z, dim=0, correction=1) + eps).sqrt()
    covariance = torch.cov(z.T).reshape(z.shape[1], z.shape[1])
    lower = torch.tril(covariance, diagonal=-1)
    return (margin - std).clamp(min=0).mean(), 2 * (lower * lower).sum() / z.shape[1]


def per_place(z, margin, eps):
    """The mean over the places of [B, K, C]."""
    parts = [hinge_and_squares(z[:, k], margin, eps) for k in range(z.shape[1])]
    return [torch.stack(terms).mean() for terms in zip(*parts, strict=True)]


def published(
    embeddings, maps, grids, alpha=0.75, num_matches=(5, 3), l2_all_matches=True,
    match_order="position", fast_vc_reg=False, covariance="all_views", margin=1.0, eps=1e-4,
):  # fmt: skip
    """The seven terms as the source defines them: each of the first two views with every other."""
    maps = [z.flatten(1, -2) for z in maps]
    grids = [z.flatten(1, -2).double() for z in grids]
    count = len(maps)
    pairs = [(i, j) for i in (0, 1) for j in range(count) if i != j]
    zero = torch.zeros((), dtype=torch.float64)
    joint, local = [zero] * 3, [zero] * 3
    if alpha > 0:
        parts = [hinge_and_squares(z, margin, eps) for z in embeddings]
        joint = [
            torch.stack([(embeddings[i] - embeddings[j]).pow(2).mean() for i, j in pairs]).mean(),
            *(torch.stack(terms).mean() for terms in zip(*parts, strict=True)),
        ]
    if alpha < 1:
        collected = []
        for i, j in pairs:
            way_terms = []
            for by_feature in (True, False):
                at = maps if by_feature else grids
                counts = (None, None) if by_feature and l2_all_matches else num_matches
                for a, b, kept in ((i, j, counts[0]), (j, i, counts[1])):
                    x, y = matched(maps[a], maps[b], at[a], at[b], kept, match_order)
                    hx, cx = per_place(x, margin, eps)
                    hy, cy = per_place(y, margin, eps)
                    difference = torch.nn.functional.mse_loss(x, y)
                    way_terms.append(torch.stack([difference, (hx + hy) / 2, (cx + cy) / 2]) / 2)
            collected.append(torch.stack(way_terms).sum(0))
        local = list(torch.stack(collected).mean(0))
        if fast_vc_reg:
            parts = [per_place(z, margin, eps) for z in maps]
            local[1] = sum(h for h, _ in parts) / count
            local[2] = sum(c for _, c in parts) / count
            if covariance == "last_view":
                local[2] = 2 * parts[-1][1] / count
    weights = (25.0, 25.0, 1.0)
    both = [sum(w * t for w, t in zip(weights, ts, strict=True)) for ts in (joint, local)]
    return alpha * both[0] + (1 - alpha) * both[1], *joint, *local


def wide(inputs):
    embeddings, maps, grids = inputs
    return (
        [z.detach().double().requires_grad_() for z in embeddings],
        [z.detach().double().requires_grad_() for z in maps],
        grids,
    )


@pytest.mark.parametrize(
    ("way", "views"), [*((way, "small") for way in WAYS), ("published", "two"), ("fast", "unlike")]
)
def test_the_published_definition(way, views):
    inputs = wide(draw(VIEWS[views], batch=4, channels=5, dim=7))
    expected = published(*inputs, **{**MATCHES, **WAYS[way]})
    actual = outcome(inputs, None, **WAYS[way])
    torch.testing.assert_close(
        torch.stack(actual.values), torch.stack(expected), rtol=SAME_FORMULA, atol=SAME_FORMULA
    )
    total = sum(c * term for c, term in zip(SEVEN, expected, strict=True))
    leaves = [*inputs[0], *inputs[1]]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    for mine, theirs in zip(actual.gradients, grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_worked_example():
    """One channel, three positions a view: matches and differences by hand."""
    a = torch.tensor([[[0.0], [2.0], [5.0]]], dtype=torch.float64)[None]
    b = torch.tensor([[[1.0], [5.5], [1.0]]], dtype=torch.float64)[None]
    matches = op.match(a, b, "reference")
    # a's nearest: 0 -> 1.0 (first of two), 2 -> 1.0 (first), 5 -> 5.5; distances 1, 1, 0.5
    assert matches.nearest_a.tolist() == [[[[0, 0, 1]]]]
    assert matches.rank_a.tolist() == [[[[1, 2, 0]]]]
    # b's nearest: 1 -> 0 (a tie with 2), 5.5 -> 5, 1 -> 0; distances 1, 0.5, 1
    assert matches.nearest_b.tolist() == [[[[0, 2, 0]]]]
    assert matches.rank_b.tolist() == [[[[1, 0, 2]]]]
    kept_a, kept_b = op.Kept([2, 3], [1.0, 3.0]), op.Kept([1], [10.0])
    value = op.pairs(a, b, matches, kept_a, kept_b, "reference")
    expected = (0.25 + 1.0) / 2 + 3.0 * (0.25 + 1.0 + 1.0) / 3 + 10.0 * 0.25
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_nan_counts_as_infinitely_far():
    a = torch.randn(1, 2, 4, 3)
    b = torch.randn(1, 2, 5, 3)
    a[0, 0, 1] = torch.nan
    b[0, 0, 3] = torch.inf
    b[0, 1] = torch.nan
    matches = op.match(a, b, "reference")
    assert matches.rank_a[0, 0, 0, 1] == 3
    assert matches.rank_b[0, 0, 0, 3] == 4
    assert not (matches.nearest_b[0, 0, 0] == 1).any()
    assert not (matches.nearest_a[0, 0, 0] == 3).any()
    assert matches.nearest_a[0, 0, 1].tolist() == [0] * 4
    assert matches.rank_a[0, 0, 1].tolist() == list(range(4))


def test_identical_views_differ_nowhere():
    (e, *_), (m, *_), (g, *_) = draw(((3, 3),), dtype=torch.float64)
    terms = vicregl_terms([e, e], [m, m], [g, g], **MATCHES)
    assert terms.invariance.item() == 0.0
    assert terms.local_invariance.item() == 0.0


def test_the_loss_is_the_weighed_terms():
    inputs = draw(VIEWS["small"], dtype=torch.float64)
    settings = {
        **MATCHES, "alpha": 0.3, "invariance_weight": 2.0, "variance_weight": 3.0,
        "covariance_weight": 5.0,
    }  # fmt: skip
    loss, *terms = vicregl_terms(*inputs, **settings)
    joint, local = (2 * i + 3 * v + 5 * c for i, v, c in (terms[:3], terms[3:]))
    torch.testing.assert_close(loss, 0.3 * joint + 0.7 * local)
    torch.testing.assert_close(loss, vicregl_loss(*inputs, **settings))
    torch.testing.assert_close(loss, VICRegLLoss(**settings)(*inputs))


def test_defaults_and_flattened_maps():
    """num_matches (20, 4), alpha 3/4, all features; maps [B, L, C] are maps [B, H, W, C]."""
    inputs = draw(((5, 5), (5, 5)), batch=3, dtype=torch.float64)
    expected = published(*inputs, num_matches=(20, 4))[0]
    embeddings, maps, grids = inputs
    flat = [z.flatten(1, 2) for z in maps], [z.flatten(1, 2) for z in grids]
    for actual in (VICRegLLoss()(*inputs), vicregl_loss(embeddings, *flat)):
        torch.testing.assert_close(actual, expected, rtol=SAME_FORMULA, atol=SAME_FORMULA)


def test_alpha_at_its_ends_reads_one_half():
    embeddings, maps, grids = draw(VIEWS["two"])
    assert vicregl_loss(embeddings, None, None, alpha=1.0).isfinite()
    assert vicregl_loss(None, maps, grids, alpha=0.0, **MATCHES).isfinite()


@pytest.mark.parametrize("way", ["published", "fast"])
def test_finite_differences(way):
    """The choice of matches is constant around a point, so the loss is smooth there."""
    embeddings, maps, grids = draw(((2, 2), (2, 2), (1, 2)), 3, 2, 3, torch.float64)

    def function(*leaves):
        return vicregl_loss(
            leaves[:3], leaves[3:], grids, num_matches=(3, 1), margin=3.0, **WAYS[way]
        )

    assert gradcheck(function, (*embeddings, *maps), fast_mode=True)
    assert gradgradcheck(function, (*embeddings, *maps), fast_mode=True)


def test_the_setting_is_one_object():
    """What ranks compare: every number that the loss depends on is in it."""
    named = set(reference.Setting.__dataclass_fields__)
    assert named == {
        "alpha", "num_matches", "l2_all_matches", "match_order", "fast_vc_reg", "covariance",
        "weights", "margin", "eps",
    }  # fmt: skip
