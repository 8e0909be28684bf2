"""VICRegL put together from the ops of this package.

The published code computes the loss pair of views by pair of views. Here every pair of maps is
searched once for both directions and both roles, the squared differences of all that is kept are
one pass, sets that are a whole map share that map's statistics, and the statistics themselves are
`variance_covariance`, which multiplies on the smaller of batch and channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.tokens import gather_tokens
from vicreg_kernels.vicreg import variance_covariance, vicreg_terms
from vicreg_kernels.vicregl import op, ranks
from vicreg_kernels.vicregl.op import Kept, Matches
from vicreg_kernels.vicregl.reference import Setting

LARGE = 2  # the first views: each of them is compared with every other view

Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Run:
    """What every part of one call needs.

    backend: the one that runs; requested_backend: the one asked for; group: the name of the ranks'
    group, or None; rows: B.
    """

    setting: Setting
    backend: str
    requested_backend: str | None
    group: str | None
    rows: int

    @property
    def ranks(self) -> Any:
        """The group as other ops take it."""
        return None if self.group is None else distributed.by_name(self.group)

    def statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Hinge and covariance of [B, D] or [G, B, D]."""
        return variance_covariance(
            z,
            margin=self.setting.margin,
            eps=self.setting.eps,
            backend=self.requested_backend,
            process_group=self.ranks,
        )

    def zero(self, like: Tensor) -> Tensor:
        """A zero of the terms' dtype."""
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        return like.new_zeros((), dtype=wide)


def _stack(views: Sequence[Tensor]) -> Tensor:
    return views[0][None] if len(views) == 1 else torch.stack(list(views))


def _across(embeddings: Sequence[Tensor], run: Run) -> Tensor:
    """The part of the invariance that small views have: each large one with each small one."""
    small = embeddings[LARGE:]
    if not small:
        return run.zero(embeddings[0])
    # As maps of one position there is nothing to search, and both directions are the same.
    a, b = torch.stack(list(embeddings[:LARGE]))[:, :, None], torch.stack(list(small))[:, :, None]
    zeros = torch.zeros((4, LARGE, len(small), run.rows, 1), dtype=torch.int32, device=a.device)
    once, none = Kept([1], [1.0 / _ordered_pairs(embeddings)]), Kept([], [])
    return op.pairs(a, b, Matches(*zeros.unbind()), once, none, run.backend)


def _ordered_pairs(views: Sequence[Tensor]) -> int:
    return LARGE * (len(views) - 1)


def _global(embeddings: Sequence[Tensor], across: Tensor, run: Run) -> Three:
    """(invariance, variance, covariance) of embeddings [B, D], one a view."""
    pair = vicreg_terms(
        *embeddings[:LARGE],
        margin=run.setting.margin,
        eps=run.setting.eps,
        convention="vicregl",
        backend=run.requested_backend,
        process_group=run.ranks,
    )
    if len(embeddings) == LARGE:
        return pair.invariance, pair.variance, pair.covariance
    variance, covariance = run.statistics(torch.stack(list(embeddings[LARGE:])))
    share = LARGE / len(embeddings)
    return (  # the pair of large views comes twice
        pair.invariance * (2.0 / _ordered_pairs(embeddings)) + across,
        pair.variance * share + variance * (1.0 - share),
        pair.covariance * share + covariance * (1.0 - share),
    )


class _Block(NamedTuple):
    """Views that are paired each with each: positions in the list of views. both: each side is
    also the other's large view, so that both roles are computed at once."""

    a: list[int]
    b: list[int]
    both: bool


def _blocks(maps: Sequence[Tensor]) -> Iterator[_Block]:
    yield _Block([0], [1], True)
    by_length: dict[int, list[int]] = {}
    for i in range(LARGE, len(maps)):
        by_length.setdefault(int(maps[i].shape[1]), []).append(i)
    large = [[0, 1]] if maps[0].shape == maps[1].shape else [[0], [1]]
    for views in by_length.values():
        for a in large:
            yield _Block(a, views, False)


def _rules(block: _Block, counts: tuple[int | None, int | None], share: float) -> Any:
    """What is kept of a's matches and of b's: [(count or None for all, weight)] each."""
    first, second = (counts[0], share), (counts[1], share)
    if not block.both:
        return [first], [second]
    if counts[0] == counts[1]:
        return [(counts[0], 2 * share)], [(counts[0], 2 * share)]
    return [first, second], [first, second]


def _kept(rules: Sequence[tuple[int | None, float]], z: Tensor) -> Kept:
    return Kept([z.shape[2] if c is None else c for c, _ in rules], [w for _, w in rules])


def _matched(maps: Sequence[Tensor], grids: Sequence[Tensor], run: Run) -> tuple[Tensor, _Sets]:
    """The invariance of maps [B, L, C] at grids [B, L, 2], one a view, and the matched sets."""
    setting = run.setting
    share = 0.5 / _ordered_pairs(maps)  # one direction of one pair
    features = (None, None) if setting.l2_all_matches else setting.num_matches
    invariance = run.zero(maps[0])
    sets = _Sets(maps, run)
    for block in _blocks(maps):
        a, b = (_stack([maps[i] for i in side]) for side in block[:2])
        at_a, at_b = (_stack([grids[i] for i in side]) for side in block[:2])
        for matches, counts in (
            (op.match(a, b, run.backend), features),
            (op.match(at_a, at_b, run.backend), setting.num_matches),
        ):
            rules = _rules(block, counts, share)
            kept = _kept(rules[0], a), _kept(rules[1], b)
            invariance = invariance + op.pairs(a, b, matches, *kept, run.backend)
            if not setting.fast_vc_reg:
                sets.add(block, matches, rules)
    return invariance, sets


def _maps_statistics(maps: Sequence[Tensor], run: Run) -> tuple[Tensor, Tensor]:
    """Statistics of the maps themselves: the mean over views of the mean over positions."""
    statistics = [run.statistics(z.transpose(0, 1)) for z in maps]
    variance = torch.stack([hinge for hinge, _ in statistics]).mean()
    squares = torch.stack([square for _, square in statistics])
    if run.setting.covariance == "last_view":
        return variance, squares[-1] * (2.0 / len(maps))
    return variance, squares.mean()


class _Sets:
    """Weighed sum of the statistics of the matched sets [B, K, C].

    All rows that sets take from a map are gathered at once, so that its gradient is scattered once;
    sets of one size and weight are neighbours there and share one call.
    """

    def __init__(self, maps: Sequence[Tensor], run: Run) -> None:
        self.maps = maps
        self.run = run
        self.whole = [0.0] * len(maps)  # the weight of each map as a set
        # A map's sets by (count, or the view whose positions they all are; weight): not by their
        # size, which a compiled graph need not know.
        self.taken: list[dict[tuple[Any, float], list[Tensor]]] = [{} for _ in maps]

    def add(self, block: _Block, matches: Matches, rules: Any) -> None:
        for u, i in enumerate(block.a):
            for v, j in enumerate(block.b):
                self._one(i, j, matches.nearest_a[u, v], matches.rank_a[u, v], rules[0])
                self._one(j, i, matches.nearest_b[u, v], matches.rank_b[u, v], rules[1])

    def _one(self, i: int, j: int, nearest: Tensor, rank: Tensor, rules: Any) -> None:
        """The matches of view i in view j: a set of either."""
        by_position = self.run.setting.match_order == "position"
        by_distance: Tensor | None = None
        for count, weight in rules:
            if count is None and by_position:
                self.whole[i] += weight / 2
                self._take(j, nearest, (("all", i), weight / 2))
                continue
            if by_distance is None:
                by_distance = rank.argsort(dim=-1)
            places = by_distance[:, :count]
            if by_position:
                places = places.sort(dim=-1).values
            key = (("all", i) if count is None else count, weight / 2)
            self._take(i, places.int(), key)
            self._take(j, nearest.gather(-1, places), key)

    def _take(self, view: int, index: Tensor, key: tuple[Any, float]) -> None:
        self.taken[view].setdefault(key, []).append(index)

    def total(self) -> tuple[Tensor, Tensor]:
        """(variance, covariance)."""
        sets = [(w, z) for w, z in zip(self.whole, self.maps, strict=True) if w]
        for z, taken in zip(self.maps, self.taken, strict=True):
            if not taken:
                continue
            index = torch.cat([index for indices in taken.values() for index in indices], dim=1)
            rows = gather_tokens(z, index, backend=self.run.requested_backend)
            sizes = [sum(index.shape[1] for index in indices) for indices in taken.values()]
            weights = [weight * len(indices) for (_, weight), indices in taken.items()]
            sets += zip(weights, rows.split(sizes, dim=1), strict=True)
        statistics = [(weight, *self.run.statistics(z.transpose(0, 1))) for weight, z in sets]
        variance = torch.stack([weight * hinge for weight, hinge, _ in statistics]).sum()
        covariance = torch.stack([weight * squares for weight, _, squares in statistics]).sum()
        return variance, covariance


def composed(
    embeddings: list[Tensor], maps: list[Tensor], grids: list[Tensor], run: Run
) -> tuple[Tensor, ...]:
    setting = run.setting
    # A view's gradient is a sum over ops, and float16 does not hold every part of one that it
    # holds: autograd adds them up in float32 and rounds once.
    embeddings, maps = (
        [z.float() if z.dtype == torch.float16 else z for z in views]
        for views in (embeddings, maps)
    )
    zero = run.zero((embeddings or maps)[0])
    across, matched, sets = zero, zero, None
    if setting.alpha > 0:
        across = _across(embeddings, run)
    if setting.alpha < 1:
        matched, sets = _matched(maps, grids, run)
    if run.group is not None:
        shapes = [tuple(z.shape[1:]) for z in (*embeddings, *maps)]
        facts = f"{setting}, views {shapes}"
        across, matched = ranks.mean(
            torch.stack([across, matched]), run.rows, facts, run.group
        ).unbind()
    both: list[Three] = [(zero,) * 3, (zero,) * 3]
    if setting.alpha > 0:
        both[0] = _global(embeddings, across, run)
    if sets is not None:
        regularised = _maps_statistics(maps, run) if setting.fast_vc_reg else sets.total()
        both[1] = (matched, *regularised)
    shares = (setting.alpha, 1.0 - setting.alpha)
    weighed = [
        share * weight * term
        for share, terms in zip(shares, both, strict=True)
        for weight, term in zip(setting.weights, terms, strict=True)
        if share
    ]
    return torch.stack(weighed).sum(), *both[0], *both[1]
