"""Landmarks: latents of visited places, and the counted number of steps between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

LAGS = 16  # steps of a walk: the longest piece that is counted
PASSAGE = 1.0  # steps that a piece costs more than it took: a landmark stands for its surroundings
OFF = 4.0  # steps
LOOKED_UP = 1 << 22  # distances at once
MOST = 4096  # landmarks: their table of steps has 64 MiB
NONE = 255  # of the fewest steps: no walk was seen


@dataclass(frozen=True)
class Landmarks:
    """A map in latent space, counted from walks alone.

    places: [M, D], latents that were seen, at least `spacing` from each other, so that each latent
    of the walks is less than `spacing` from one of them. steps: [M, M], the fewest steps from one
    to another over pieces of walks, infinite where none connects them.
    """

    places: Tensor
    steps: Tensor
    spacing: float

    def __post_init__(self) -> None:
        count = len(self.places)
        if self.places.dim() != 2 or self.steps.shape != (count, count):
            shapes = [list(self.places.shape), list(self.steps.shape)]
            raise ValueError(f"places, steps: got shapes {shapes}, take [M, D] and [M, M]")
        _above_zero(self.spacing)

    def nearest(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(int64 [...], the number of the nearest landmark; float [...], steps that stand for the
        way to it) of latents [..., D]. Within `spacing` the way costs nothing, and OFF steps for
        each `spacing` more: walks came nowhere near such a latent, so that it is likely to be a
        wrong prediction.
        """
        flat = latents.reshape(-1, latents.shape[-1])
        rows = max(1, LOOKED_UP // len(self.places))
        found = [torch.cdist(some, self.places).min(dim=1) for some in flat.split(rows)]
        distance = torch.cat([one.values for one in found])
        place = torch.cat([one.indices for one in found])
        off = OFF * (distance / self.spacing - 1).clamp(min=0)
        return place.view(latents.shape[:-1]), off.view(latents.shape[:-1])

    def between(self, latents: Tensor, others: Tensor) -> Tensor:
        """float [...]: the counted steps from latents to others, [..., D] each, without the ways to
        their landmarks; infinite where no walk connects them.
        """
        return self.steps[self.nearest(latents)[0], self.nearest(others)[0]]


class Counts(nn.Module):
    """Counts landmarks of walks as they come; its buffers are its state.

    dim: D of the latents. most: the landmarks that there is room for; their table has most**2
    bytes. A latent that is more than `spacing` from all landmarks becomes one. The fewest steps of
    a piece of a walk from around one landmark to around another are kept, up to LAGS.
    """

    places: Tensor
    fewest: Tensor
    found: Tensor
    spacing: Tensor

    def __init__(self, dim: int, most: int) -> None:
        super().__init__()
        if most < 1:
            raise ValueError(f"most: got {most}, takes 1 or more")
        self.register_buffer("places", torch.zeros(most, dim))
        self.register_buffer("fewest", torch.full((most, most), NONE, dtype=torch.uint8))
        self.register_buffer("found", torch.zeros((), dtype=torch.int64))
        self.register_buffer("spacing", torch.zeros(()))

    @torch.no_grad()
    def see(self, walks: Tensor, times: Sequence[int]) -> None:
        """Count latents [N, F, D] of N walks, seen at these times, in order. Raises ValueError for
        more landmarks than there is room for.
        """
        self._add(walks.flatten(0, 1))
        count = int(self.found)
        which = torch.cdist(walks.flatten(0, 1), self.places[:count]).argmin(dim=1)
        which = which.view(walks.shape[:2])
        for (first, before), (second, after) in combinations(enumerate(times), 2):
            lag = after - before
            if 1 <= lag <= LAGS:
                here, there = which[:, first], which[:, second]
                self.fewest[here, there] = self.fewest[here, there].clamp(max=lag)

    def _add(self, latents: Tensor) -> None:
        """Add those of latents [N, D], in their order, that are far from all landmarks."""
        count, spacing = int(self.found), float(self.spacing)
        if count:
            near = torch.cdist(latents, self.places[:count]).amin(dim=1)
            latents = latents[near > spacing]
        while len(latents):
            if count == len(self.places):
                raise ValueError(
                    f"spacing: got {spacing:g}, with which the walks have more than {count} "
                    "landmarks; takes more"
                )
            self.places[count] = latents[0]
            count += 1
            latents = latents[torch.linalg.vector_norm(latents - latents[0], dim=1) > spacing]
        self.found.fill_(count)

    def landmarks(self) -> Landmarks:
        """The landmarks so far, with the shortest paths between them."""
        count = int(self.found)
        fewest = self.fewest[:count, :count]
        costs = torch.where(fewest < NONE, fewest + PASSAGE, torch.inf).fill_diagonal_(0)
        return Landmarks(self.places[:count].clone(), shortest(costs), float(self.spacing))


def counted(walks: Tensor, spacing: float, most: int = MOST) -> Landmarks:
    """Count the landmarks of walks, latents [N, T, D] of T consecutive steps, at least 2. Raises
    ValueError for more than `most`.
    """
    if walks.dim() != 3 or walks.shape[1] < 2:
        raise ValueError(f"walks: got shape {list(walks.shape)}, takes [N, T, D], T two or more")
    if not bool(torch.isfinite(walks).all()):
        raise ValueError("walks: got values that are not finite, takes finite numbers")
    _above_zero(spacing)
    counts = Counts(walks.shape[2], most)
    counts.spacing.fill_(spacing)
    for some in walks.split(256):
        counts.see(some, range(walks.shape[1]))
    return counts.landmarks()


def _above_zero(spacing: float) -> None:
    if not 0 < spacing < torch.inf:
        raise ValueError(f"spacing: got {spacing}, takes a finite number of more than 0")


def shortest(costs: Tensor) -> Tensor:
    """float [M, M]: the lengths of the shortest paths over steps of these costs [M, M]."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import dijkstra

    known = torch.isfinite(costs) & (costs > 0)
    rows, columns = known.nonzero(as_tuple=True)
    graph = csr_matrix(
        (costs[known].double().numpy(), (rows.numpy(), columns.numpy())), costs.shape
    )
    return torch.from_numpy(dijkstra(graph)).to(costs)
