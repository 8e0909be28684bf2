"""lightly's VICRegLLoss, where it is installed: the same value and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.vicregl.cases import VIEWS, draw
from vicreg_kernels.vicregl import VICRegLLoss


def differentiated(loss, inputs):
    embeddings, maps, _ = inputs
    value = loss(*inputs).squeeze()  # lightly gives a loss of shape [1]
    return value.detach(), *torch.autograd.grad(value, [*embeddings, *maps])


@pytest.mark.parametrize("views", ["two", "small"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lightly(views, dtype):
    """It keeps num_matches of the matches by feature too, and lists matches by distance."""
    try:
        from lightly.loss import VICRegLLoss as Lightly
    except ImportError as error:
        pytest.skip(f"lightly's losses cannot be imported: {error}")
    theirs = Lightly(num_matches=(5, 3))
    ours = VICRegLLoss(num_matches=(5, 3), l2_all_matches=False, match_order="distance")

    def lightly(embeddings, maps, grids):
        features = list(zip(embeddings, maps, strict=True))
        small = (features[2:], grids[2:]) if len(features) > 2 else ()
        return theirs(features[:2], grids[:2], *small)

    embeddings, maps, grids = draw(VIEWS[views], dtype=dtype)
    inputs = embeddings, maps, [z.to(dtype) for z in grids]
    rtol = 1e-12 if dtype == torch.float64 else 1e-4
    for mine, peer in zip(
        differentiated(ours, inputs), differentiated(lightly, inputs), strict=True
    ):
        torch.testing.assert_close(mine, peer, rtol=rtol, atol=rtol * peer.abs().max().item())
