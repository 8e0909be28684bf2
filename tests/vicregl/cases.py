"""Views, maps and grids that the VICRegL tests draw, and the outcomes they compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.tolerances import Outcome
from vicreg_kernels.vicregl import vicregl_terms

# Cotangents of the seven terms: all differ, two are negative.
SEVEN = (0.7, -1.9, 2.3, 1.1, 0.3, -0.6, 1.7)
# name -> settings: every way that matches and statistics are taken.
WAYS: dict[str, dict[str, Any]] = {
    "published": {},
    "few features": {"l2_all_matches": False},
    "lightly": {"l2_all_matches": False, "match_order": "distance"},
    "all by distance": {"match_order": "distance", "num_matches": (None, 3)},
    "same counts": {"num_matches": (3, 3), "margin": 1.5, "eps": 1e-2},
    "fast": {"fast_vc_reg": True},
    "last view": {"fast_vc_reg": True, "covariance": "last_view"},
    "maps alone": {"alpha": 0.0},
    "embeddings alone": {"alpha": 1.0},
}
# Heights and widths of the maps: two views, small ones of two sizes, large ones that differ.
VIEWS = {
    "two": ((3, 3), (3, 3)),
    "small": ((4, 3), (4, 3), (2, 2), (3, 2), (2, 2)),
    "unlike": ((3, 3), (2, 4), (2, 2)),
}
MATCHES = {"num_matches": (5, 3)}

Inputs = tuple[list[Tensor], list[Tensor], list[Tensor]]


def draw(
    views: tuple[tuple[int, int], ...],
    batch: int = 6,
    channels: int = 10,
    dim: int = 12,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Inputs:
    """Embeddings [B, D] and maps [B, H, W, C] that resemble each other, grids that overlap."""
    common = torch.randn(batch, dim)
    content = torch.randn(batch, 1, 1, channels)
    embeddings = [common + 0.5 * torch.randn(batch, dim) for _ in views]
    maps = [content + torch.randn(batch, *shape, channels) for shape in views]
    grids = [torch.rand(batch, *shape, 2) * 224 for shape in views]

    def leaf(z: Tensor) -> Tensor:
        return z.to(device=device, dtype=dtype).requires_grad_()

    return [leaf(z) for z in embeddings], [leaf(z) for z in maps], [z.to(device) for z in grids]


def outcome(inputs: Inputs, backend: str | None, double: bool = False, **settings: Any) -> Outcome:
    """The seven terms, and the gradient of their sum weighed by SEVEN; embeddings, then maps."""
    embeddings, maps, grids = inputs

    def leaf(z: Tensor) -> Tensor:
        return (z.detach().double() if double else z.detach()).requires_grad_()

    embeddings, maps = [leaf(z) for z in embeddings], [leaf(z) for z in maps]
    settings = {**MATCHES, **settings}
    terms = vicregl_terms(embeddings, maps, grids, backend=backend, **settings)
    total = sum(c * term for c, term in zip(SEVEN, terms, strict=True))
    leaves = [*embeddings, *maps]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return Outcome(tuple(term.detach() for term in terms), grads)
