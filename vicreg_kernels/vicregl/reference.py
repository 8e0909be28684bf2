"""VICRegL in plain PyTorch: the specification every backend is held to.

`match` and `pairs` are the two ops; `terms` is the whole loss as the published code defines it,
pair of views by pair of views, with the statistics of every matched set computed anew. No tricks:
what is fast, and what is computed once instead of several times, lives elsewhere. Differentiable by
autograd to any order, and float64-capable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vicreg_kernels.core import library
from vicreg_kernels.vicreg.reference import _per_view


def _working(*tensors: Tensor) -> list[Tensor]:
    """Half tensors in float32."""
    return [z if z.dtype == torch.float64 else z.float() for z in tensors]


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """[..., L1, C] and [..., L2, C] -> Euclidean distances [..., L1, L2], NaN counting as +inf."""
    a, b = _working(a, b)
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _nearest(distances: Tensor) -> tuple[Tensor, Tensor]:
    """[..., L1, L2] -> the nearest position of each of the L1, and the rank of its distance."""
    least, nearest = distances.amin(-1), distances.argmin(-1)
    rank = least.argsort(dim=-1, stable=True).argsort(dim=-1)
    return nearest.int(), rank.int()


def match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a: [U, B, L1, C]; b: [V, B, L2, C] -> nearest and rank of a's positions, then of b's."""
    with torch.no_grad(), library.no_autocast(a.device):
        distances = _distances(a[:, None], b[None])  # [U, V, B, L1, L2]
        return *_nearest(distances), *_nearest(distances.mT)


def _rows(z: Tensor, index: Tensor) -> Tensor:
    """z: [..., L, C] at index [..., K]; leading dimensions broadcast."""
    lead = torch.broadcast_shapes(z.shape[:-2], index.shape[:-1])
    z, index = z.expand(*lead, *z.shape[-2:]), index.expand(*lead, index.shape[-1])
    return torch.gather(z, -2, index.long()[..., None].expand(*index.shape, z.shape[-1]))


def pairs(
    a: Tensor,
    b: Tensor,
    nearest_a: Tensor,
    rank_a: Tensor,
    nearest_b: Tensor,
    rank_b: Tensor,
    counts_a: Sequence[int],
    weights_a: Sequence[float],
    counts_b: Sequence[int],
    weights_b: Sequence[float],
) -> Tensor:
    """The weighed mean squared differences of `contract.py`."""
    with library.no_autocast(a.device):
        a, b = _working(a, b)
        a, b = a[:, None], b[None]
        total = a.new_zeros(())
        for own, other, nearest, rank, counts, weights in (
            (a, b, nearest_a, rank_a, counts_a, weights_a),
            (b, a, nearest_b, rank_b, counts_b, weights_b),
        ):
            squares = (own - _rows(other, nearest)).square().mean(-1)  # [U, V, B, L]
            for count, weight in zip(counts, weights, strict=True):
                kept = torch.where(rank < count, squares, 0.0).sum(-1) / count
                total = total + weight * kept.mean(-1).sum()
        return total


@dataclass(frozen=True)
class Setting:
    """How the loss is put together; `vicregl_loss` says what each is."""

    alpha: float
    num_matches: tuple[int | None, int | None]
    l2_all_matches: bool
    match_order: str
    fast_vc_reg: bool
    covariance: str
    weights: tuple[float, float, float]
    margin: float
    eps: float


def _statistics(z: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Hinge and covariance term of [B, K, C], statistics over the batch, mean over K."""
    variance, covariance = _per_view(z.transpose(0, 1), setting.margin, setting.eps, True)
    return variance, covariance / z.shape[-1]


def _kept(own: Tensor, other: Tensor, distances: Tensor, count: int | None, order: str) -> tuple:
    """Matched rows of own [B, L1, C] and other [B, L2, C], [B, count, C] each."""
    nearest, rank = _nearest(distances)
    places = rank.argsort(dim=-1)[:, : own.shape[1] if count is None else count]
    if order == "position":
        places = places.sort(dim=-1).values
    return _rows(own, places), _rows(other, nearest.gather(-1, places).long())


def _local(
    maps: Sequence[Tensor], grids: Sequence[Tensor], setting: Setting
) -> tuple[Tensor, Tensor, Tensor]:
    """(invariance, variance, covariance) of maps [B, L, C] and grids [B, L, 2]."""
    zero = maps[0].new_zeros(())
    invariance, variance, covariance = zero, zero, zero
    ordered = [(i, j) for i in range(2) for j in range(len(maps)) if j != i]
    for i, j in ordered:
        features = (None, None) if setting.l2_all_matches else setting.num_matches
        with torch.no_grad():
            by_feature = _distances(maps[i], maps[j])
            by_location = _distances(grids[i], grids[j])
        for distances, counts in ((by_feature, features), (by_location, setting.num_matches)):
            for own, other, distance, count in (
                (maps[i], maps[j], distances, counts[0]),
                (maps[j], maps[i], distances.mT, counts[1]),
            ):
                x, y = _kept(own, other, distance, count, setting.match_order)
                invariance = invariance + (x - y).square().mean() / 2
                if not setting.fast_vc_reg:
                    for z in (x, y):
                        hinge, squares = _statistics(z, setting)
                        variance, covariance = variance + hinge / 4, covariance + squares / 4
    pairs_count = len(ordered)
    if not setting.fast_vc_reg:
        return invariance / pairs_count, variance / pairs_count, covariance / pairs_count
    statistics = [_statistics(z, setting) for z in maps]
    variance = sum(hinge for hinge, _ in statistics) / len(maps)
    if setting.covariance == "last_view":
        return invariance / pairs_count, variance, 2 * statistics[-1][1] / len(maps)
    return invariance / pairs_count, variance, sum(s for _, s in statistics) / len(maps)


def _global(embeddings: Sequence[Tensor], setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """(invariance, variance, covariance) of embeddings [B, D]."""
    ordered = [(i, j) for i in range(2) for j in range(len(embeddings)) if j != i]
    differences = [(embeddings[i] - embeddings[j]).square().mean() for i, j in ordered]
    statistics = [_statistics(z[:, None], setting) for z in embeddings]
    return (
        sum(differences) / len(ordered),
        sum(hinge for hinge, _ in statistics) / len(statistics),
        sum(squares for _, squares in statistics) / len(statistics),
    )


def terms(
    embeddings: Sequence[Tensor],
    maps: Sequence[Tensor],
    grids: Sequence[Tensor],
    setting: Setting,
) -> tuple[Tensor, ...]:
    """(loss, invariance, variance, covariance, and the three local terms), the terms unweighted.

    embeddings: [B, D]; maps: [B, L, C]; grids: [B, L, 2]; one each a view, the two large views
    first. With alpha = 1 the maps are not read, with alpha = 0 the embeddings: their terms are 0.
    """
    first = (embeddings or maps)[0]
    with library.no_autocast(first.device):
        embeddings, maps, grids = (_working(*zs) for zs in (embeddings, maps, grids))
        zero = _working(first)[0].new_zeros(())
        both = [(zero,) * 3, (zero,) * 3]
        if setting.alpha > 0:
            both[0] = _global(embeddings, setting)
        if setting.alpha < 1:
            both[1] = _local(maps, grids, setting)
        summed = [
            sum(weight * term for weight, term in zip(setting.weights, terms, strict=True))
            for terms in both
        ]
        loss = setting.alpha * summed[0] + (1 - setting.alpha) * summed[1]
        return loss, *both[0], *both[1]
