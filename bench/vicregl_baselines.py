"""What VICRegL is measured against: the published formula, and the best plain PyTorch made of it.

A baseline maps embeddings [B, D], maps [B, L, C] and grids [B, L, 2], one each a view and the two
large views first, to the loss with the published defaults; `fast`: with fast_vc_reg, whose
covariance is averaged over all views as it was meant to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from bench.measure import compiled
from bench.vicreg_baselines import EPS, off_diagonal
from bench.vicreg_gram import _CovarianceTerm

Views = Sequence[Tensor]
Loss = Callable[[Views, Views, Views], Tensor]

ALPHA, MATCHES = 0.75, (20, 4)


def rows_of(z: Tensor, index: Tensor) -> Tensor:
    """z [B, L, C] at index [B, K]."""
    return torch.gather(z, 1, index[..., None].expand(-1, -1, z.shape[-1]))


def ordered_pairs(views: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(2) for j in range(views) if i != j]


def dense_statistics(z: Tensor) -> Tensor:
    """25 variance + covariance of [B, K, C] by a C x C covariance a place."""
    rows, _, dim = z.shape
    centred = z - z.mean(dim=0)
    hinge = torch.relu(1 - torch.sqrt(centred.var(dim=0) + EPS)).mean()
    by_place = centred.transpose(0, 1)
    covariance = by_place.mT @ by_place / (rows - 1)
    return 25 * hinge + (off_diagonal(covariance).pow_(2).sum(dim=-1) / dim).mean()


def matched(own: Tensor, other: Tensor, distances: Tensor, count: int | None) -> tuple[Tensor, ...]:
    """Rows of own, in the order of positions, and their nearest rows of other."""
    least, nearest = distances.min(dim=-1)
    if count is None:
        return own, rows_of(other, nearest)
    kept = least.topk(count, dim=-1, largest=False).indices.sort(dim=-1).values
    return rows_of(own, kept), rows_of(other, nearest.gather(-1, kept))


def eager(embeddings: Views, maps: Views, grids: Views, fast: bool = False) -> Tensor:
    """As published: pair of views by pair of views, in both roles, each set's statistics anew."""
    pairs = ordered_pairs(len(maps))
    joint = 25 * sum(mse_loss(embeddings[i], embeddings[j]) for i, j in pairs) / len(pairs)
    joint = joint + sum(dense_statistics(z[:, None]) for z in embeddings) / len(embeddings)
    local = embeddings[0].new_zeros(())
    for i, j in pairs:
        for at, counts in ((maps, (None, None)), (grids, MATCHES)):
            for a, b, count in ((i, j, counts[0]), (j, i, counts[1])):
                x, y = matched(maps[a], maps[b], torch.cdist(at[a], at[b]), count)
                local = local + 25 * mse_loss(x, y) / 2
                if not fast:
                    local = local + (dense_statistics(x) + dense_statistics(y)) / 4
    local = local / len(pairs)
    if fast:
        local = local + sum(dense_statistics(z) for z in maps) / len(maps)
    return ALPHA * joint + (1 - ALPHA) * local


def gram_statistics(z: Tensor) -> Tensor:
    """25 variance + covariance of [B, K, C] by the Gram trick."""
    rows, places, dim = z.shape
    hinge = torch.relu(1 - torch.sqrt(z.var(dim=0) + EPS)).mean()
    covariance = _CovarianceTerm.apply(z.transpose(0, 1)) / ((rows - 1) ** 2 * dim * places)
    return 25 * hinge + covariance


def gram_plain(embeddings: Views, maps: Views, grids: Views, fast: bool = False) -> Tensor:
    """What a user who knows the loss and the Gram trick would write: each pair of maps is searched
    once, each set's statistics are computed once.
    """
    views = len(maps)
    pairs = ordered_pairs(views)
    joint = 25 * sum(mse_loss(embeddings[i], embeddings[j]) for i, j in pairs) / len(pairs)
    joint = joint + sum(gram_statistics(z[:, None]) for z in embeddings) / views
    local = embeddings[0].new_zeros(())
    whole = [0.0] * views
    for i, j in [(i, j) for i, j in pairs if i < j]:
        roles = 2 if j < 2 else 1  # both are the large view in turn
        for at, everything in ((maps, True), (grids, False)):
            distances = torch.cdist(at[i], at[j])
            for a, b, matrix, count in (
                (i, j, distances, MATCHES[0]),
                (j, i, distances.mT, MATCHES[1]),
            ):
                least, nearest = matrix.min(dim=-1)
                counts = (None,) if everything else (MATCHES if roles == 2 else (count,))
                for kept in counts:
                    weight = roles if kept is None else 1
                    if kept is None:
                        x, y = maps[a], rows_of(maps[b], nearest)
                        whole[a] += weight / 4
                    else:
                        places = least.topk(kept, dim=-1, largest=False).indices.sort(dim=-1).values
                        x = rows_of(maps[a], places)
                        y = rows_of(maps[b], nearest.gather(-1, places))
                    local = local + 25 * weight * mse_loss(x, y) / 2
                    if not fast:
                        local = local + weight * gram_statistics(y) / 4
                        if kept is not None:
                            local = local + weight * gram_statistics(x) / 4
    if fast:
        local = local / len(pairs) + sum(gram_statistics(z) for z in maps) / views
    else:
        shared = sum(w * gram_statistics(z) for w, z in zip(whole, maps, strict=True))
        local = (local + shared) / len(pairs)
    return ALPHA * joint + (1 - ALPHA) * local


def baselines(fast: bool) -> dict[str, Callable[[], Loss]]:
    """name -> what builds it."""
    return {
        "eager": lambda: partial(eager, fast=fast),
        "compiled": lambda: compiled(partial(eager, fast=fast)),
        "gram_plain": lambda: partial(gram_plain, fast=fast),
        "gram_compiled": lambda: compiled(partial(gram_plain, fast=fast)),
    }


COMPILED = ("compiled", "gram_compiled")
