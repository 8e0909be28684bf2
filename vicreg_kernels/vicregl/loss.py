"""The public functions of VICRegL, put together from the ops of this package.

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

from vicreg_kernels import dispatch
from vicreg_kernels.tokens import gather_tokens
from vicreg_kernels.vicreg import variance_covariance, vicreg_terms
from vicreg_kernels.vicregl import checks, op, reference
from vicreg_kernels.vicregl.op import Kept, Matches
from vicreg_kernels.vicregl.reference import Setting

LARGE = 2  # the first views: each of them is compared with every other view

Three = tuple[Tensor, Tensor, Tensor]


class VICRegLTerms(NamedTuple):
    """The loss and its unweighted terms, of the embeddings and of the maps; 0-d tensors."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor
    local_invariance: Tensor
    local_variance: Tensor
    local_covariance: Tensor


@dataclass(frozen=True)
class _Run:
    """What every part of one call needs; name: the backend that runs, asked: what was asked for."""

    setting: Setting
    name: str
    asked: str | None

    def statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Hinge and covariance of [B, D] or [G, B, D]."""
        return variance_covariance(
            z, margin=self.setting.margin, eps=self.setting.eps, backend=self.asked
        )


def _stack(views: Sequence[Tensor]) -> Tensor:
    return views[0][None] if len(views) == 1 else torch.stack(list(views))


def _global(embeddings: Sequence[Tensor], run: _Run) -> Three:
    """(invariance, variance, covariance) of embeddings [B, D], one a view."""
    found = vicreg_terms(
        *embeddings[:LARGE],
        margin=run.setting.margin,
        eps=run.setting.eps,
        convention="vicregl",
        backend=run.asked,
    )
    views, small = len(embeddings), embeddings[LARGE:]
    if not small:
        return found.invariance, found.variance, found.covariance
    # Maps of one position: each large view against each small one, and no search.
    a, b = torch.stack(list(embeddings[:LARGE]))[:, :, None], torch.stack(list(small))[:, :, None]
    one = torch.zeros((LARGE, len(small), a.shape[1], 1), dtype=torch.int32, device=a.device)
    pairs = 2 * (views - 1)
    once = Kept([1], [1.0 / pairs])
    none = Kept([], [])  # both directions are the same difference
    across = op.pairs(a, b, Matches(one, one, one, one), once, none, run.name)
    variance, covariance = run.statistics(b[:, :, 0])
    share = LARGE / views
    return (  # the pair of large views comes twice
        found.invariance * (2.0 / pairs) + across,
        found.variance * share + variance * (1.0 - share),
        found.covariance * share + covariance * (1.0 - share),
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


def _local(maps: Sequence[Tensor], grids: Sequence[Tensor], run: _Run) -> Three:
    """(invariance, variance, covariance) of maps [B, L, C] and grids [B, L, 2], one a view."""
    setting = run.setting
    share = 0.5 / (2 * (len(maps) - 1))  # one direction of one of the ordered pairs
    features = (None, None) if setting.l2_all_matches else setting.num_matches
    invariance = maps[0].new_zeros((), dtype=torch.float32)
    sets = _Sets(maps, run)
    for block in _blocks(maps):
        a, b = (_stack([maps[i] for i in side]) for side in block[:2])
        at_a, at_b = (_stack([grids[i] for i in side]) for side in block[:2])
        for found, counts in (
            (op.match(a, b, run.name), features),
            (op.match(at_a, at_b, run.name), setting.num_matches),
        ):
            rules = _rules(block, counts, share)
            kept = _kept(rules[0], a), _kept(rules[1], b)
            invariance = invariance + op.pairs(a, b, found, *kept, run.name)
            if not setting.fast_vc_reg:
                sets.add(block, found, rules)
    if setting.fast_vc_reg:
        return invariance, *_maps_statistics(maps, run)
    return invariance, *sets.total()


def _maps_statistics(maps: Sequence[Tensor], run: _Run) -> tuple[Tensor, Tensor]:
    """Statistics of the maps themselves: the mean over views of the mean over positions."""
    found = [run.statistics(z.transpose(0, 1)) for z in maps]
    variance = torch.stack([hinge for hinge, _ in found]).mean()
    squares = torch.stack([square for _, square in found])
    if run.setting.covariance == "last_view":
        return variance, squares[-1] * (2.0 / len(maps))
    return variance, squares.mean()


class _Sets:
    """Weighed sum of the statistics of the matched sets [B, K, C].

    All rows that sets take from a map are gathered at once, so that its gradient is scattered once;
    sets of one size and weight are neighbours there and share one call.
    """

    def __init__(self, maps: Sequence[Tensor], run: _Run) -> None:
        self.maps = maps
        self.run = run
        self.whole = [0.0] * len(maps)  # the weight of each map as a set
        self.taken: list[dict[tuple[int, float], list[Tensor]]] = [{} for _ in maps]

    def add(self, block: _Block, found: Matches, rules: Any) -> None:
        for u, i in enumerate(block.a):
            for v, j in enumerate(block.b):
                self._one(i, j, found.nearest_a[u, v], found.rank_a[u, v], rules[0])
                self._one(j, i, found.nearest_b[u, v], found.rank_b[u, v], rules[1])

    def _one(self, i: int, j: int, nearest: Tensor, rank: Tensor, rules: Any) -> None:
        """The matches of view i in view j: a set of either."""
        by_position = self.run.setting.match_order == "position"
        by_distance: Tensor | None = None
        for count, weight in rules:
            if count is None and by_position:
                self.whole[i] += weight / 2
                self._take(j, nearest, weight / 2)
                continue
            if by_distance is None:
                by_distance = rank.argsort(dim=-1)
            places = by_distance[:, :count]
            if by_position:
                places = places.sort(dim=-1).values
            self._take(i, places.int(), weight / 2)
            self._take(j, nearest.gather(-1, places), weight / 2)

    def _take(self, view: int, index: Tensor, weight: float) -> None:
        self.taken[view].setdefault((index.shape[1], weight), []).append(index)

    def total(self) -> tuple[Tensor, Tensor]:
        """(variance, covariance)."""
        sets = [(w, z) for w, z in zip(self.whole, self.maps, strict=True) if w]
        for z, taken in zip(self.maps, self.taken, strict=True):
            if not taken:
                continue
            index = torch.cat([index for indices in taken.values() for index in indices], dim=1)
            rows = gather_tokens(z, index, backend=self.run.asked)
            sizes = [size * len(indices) for (size, _), indices in taken.items()]
            weights = [weight * len(indices) for (_, weight), indices in taken.items()]
            sets += zip(weights, rows.split(sizes, dim=1), strict=True)
        found = [(weight, *self.run.statistics(z.transpose(0, 1))) for weight, z in sets]
        variance = torch.stack([weight * hinge for weight, hinge, _ in found]).sum()
        covariance = torch.stack([weight * squares for weight, _, squares in found]).sum()
        return variance, covariance


def _fused(
    embeddings: list[Tensor], maps: list[Tensor], grids: list[Tensor], run: _Run
) -> tuple[Tensor, ...]:
    setting = run.setting
    zero = (embeddings or maps)[0].new_zeros((), dtype=torch.float32)
    both: list[Three] = [(zero,) * 3, (zero,) * 3]
    if setting.alpha > 0:
        both[0] = _global(embeddings, run)
    if setting.alpha < 1:
        both[1] = _local(maps, [grid.float() for grid in grids], run)
    shares = (setting.alpha, 1.0 - setting.alpha)
    weighed = [
        share * weight * term
        for share, found in zip(shares, both, strict=True)
        for weight, term in zip(setting.weights, found, strict=True)
        if share
    ]
    return torch.stack(weighed).sum(), *both[0], *both[1]


def _terms(
    embeddings: Sequence[Tensor] | None,
    maps: Sequence[Tensor] | None,
    grids: Sequence[Tensor] | None,
    setting: Setting,
    process_group: Any,
    backend: str | None,
) -> tuple[Tensor, ...]:
    if process_group is not None and process_group is not False:
        raise NotImplementedError("process_group: not yet")
    vectors, flat, places = checks.tensors(embeddings, maps, grids, setting, 2)
    first = (vectors or flat)[0]
    name = dispatch.choose("vicregl", backend, first.device.type, first.dtype)
    if not torch.compiler.is_compiling():
        dispatch.log_choice("vicregl", name, backend, first.device, (flat or vectors)[0].shape)
    if name == "reference":
        return reference.terms(vectors, flat, places, setting)
    return _fused(vectors, flat, places, _Run(setting, name, backend))


def vicregl_loss(
    embeddings: Sequence[Tensor] | None,
    maps: Sequence[Tensor] | None,
    grids: Sequence[Tensor] | None,
    *,
    alpha: float = 0.75,
    num_matches: Sequence[int | None] = (20, 4),
    l2_all_matches: bool = True,
    fast_vc_reg: bool = False,
    covariance: str = "all_views",
    match_order: str = "position",
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    margin: float = 1.0,
    eps: float = 1e-4,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """The VICRegL loss of two large and any number of small views (Bardes, Ponce and LeCun, 2022,
    arXiv:2210.01571).

    loss = alpha L(embeddings) + (1 - alpha) L(maps), L = w_i invariance + w_v variance + w_c
    covariance. Of the embeddings, the invariance is the mean of mean((z_i - z_j)^2) over the
    ordered pairs of a large view i and another view j, and variance and covariance are the means
    over views of mean_d relu(margin - sqrt(var_d + eps)) and sum_{c != d} C_cd^2 / D.

    The maps of such a pair are matched twice, by feature and by location: every position of map i
    with the nearest one of map j, and every position of map j with the nearest one of map i. The
    invariance is the mean squared difference of what is kept, averaged over the two directions,
    summed over the two ways of matching and averaged over pairs (docs/vicregl.md).

    Args:
        embeddings: one [B, D] a view, the two large views first, B >= 2; float32, bfloat16,
            float16 or float64, any strides. Not read where alpha = 0, and may be None there.
        maps: one feature map a view, [B, H, W, C] or [B, L, C]; views may differ in H and W. The
            embeddings' dtype. Not read where alpha = 1.
        grids: where each position of the maps lies in the image that the views were cut from,
            [B, H, W, 2] or [B, L, 2]: any unit that the views share; float.
        alpha: the share of the embeddings' loss, 0 to 1.
        num_matches: how many of the closest matches are kept from the large view i to j, and from
            j to i; None or -1 keeps all.
        l2_all_matches: keep all matches by feature; else num_matches of those too.
        fast_vc_reg: False: variance and covariance are those of the kept matches, of either side,
            for each place in the list of matches over the batch. True: those of the maps, for each
            position over the batch, averaged over views.
        covariance: with fast_vc_reg, "all_views": the mean over views. "last_view": what the
            published loop leaves, twice the last view's over the number of views.
        match_order: the kept matches' places in their list: "position" (as published), or
            "distance", closest first (lightly; with l2_all_matches=False).
        invariance_weight, variance_weight, covariance_weight: w_i, w_v, w_c.
        margin, eps: target standard deviation, and what is added to the variance under the root.
        process_group: None, or the ranks that hold the batch together: True for the default
            group. The loss is then that of the whole batch, and its gradient is multiplied by the
            number of ranks, which DistributedDataParallel's average takes out.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the input.

    Returns:
        A 0-d tensor, float32 (float64 for float64 inputs). No gradient goes through the choice of
        matches, nor to the grids. Fused backends differentiate once; "reference" to any order.

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting is not one of the above; the
            message names the argument.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    setting = checks.settings(
        alpha=alpha,
        num_matches=num_matches,
        l2_all_matches=l2_all_matches,
        fast_vc_reg=fast_vc_reg,
        covariance=covariance,
        match_order=match_order,
        invariance_weight=invariance_weight,
        variance_weight=variance_weight,
        covariance_weight=covariance_weight,
        margin=margin,
        eps=eps,
        backend=backend,
    )
    return _terms(embeddings, maps, grids, setting, process_group, backend)[0]


def vicregl_terms(
    embeddings: Sequence[Tensor] | None,
    maps: Sequence[Tensor] | None,
    grids: Sequence[Tensor] | None,
    *,
    process_group: Any = None,
    backend: str | None = None,
    **settings: Any,
) -> VICRegLTerms:
    """`vicregl_loss` with its terms, each differentiable.

    Takes the arguments of `vicregl_loss`. Returns VICRegLTerms(loss, invariance, variance,
    covariance, local_invariance, local_variance, local_covariance): 0-d tensors; the terms are
    unweighted, the first three of the embeddings and the last three of the maps, 0 where alpha
    leaves them out.
    """
    setting = checks.settings(**{**DEFAULTS, **settings}, backend=backend)
    return VICRegLTerms(*_terms(embeddings, maps, grids, setting, process_group, backend))


DEFAULTS: dict[str, Any] = {
    name: value
    for name, value in (vicregl_loss.__kwdefaults__ or {}).items()
    if name not in ("process_group", "backend")
}
