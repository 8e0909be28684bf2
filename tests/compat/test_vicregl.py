"""lightly's VICRegLLoss by its own arguments: value, shape, dtype and gradients."""

from __future__ import annotations

import pytest
import torch

from bench import peers
from tests.vicregl.cases import VIEWS, draw


@pytest.mark.parametrize("views", ["two", "small"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_vicregl(views, dtype):
    """lightly's own class: value, shape [1], dtype and gradients."""
    embeddings, maps, grids = draw(VIEWS[views], dtype=dtype)
    grids = [z.to(dtype) for z in grids]
    features = list(zip(embeddings, maps, strict=True))
    small = (features[2:], grids[2:]) if len(features) > 2 else ()

    def run(get):
        loss = get("VICRegLLoss")(20.0, 15.0, 2.0, alpha=0.6, num_matches=(5, 3))
        value = loss(features[:2], grids[:2], *small)
        return value.detach(), torch.autograd.grad(value.sum(), [*embeddings, *maps])

    value, gradients = run(peers.ours("lightly"))
    assert value.shape == (1,)
    assert value.dtype == dtype
    if dtype == torch.bfloat16:  # torch.cdist takes no half on a CPU
        return
    with peers.importable("lightly"):
        try:
            expected, slopes = run(peers.theirs("lightly"))
        except ImportError as error:
            pytest.skip(f"lightly cannot be imported: {error}")
    bound = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4}
    torch.testing.assert_close(value, expected, **{"atol": 0.0, **bound})
    for mine, theirs in zip(gradients, slopes, strict=True):
        atol = bound["rtol"] * theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=bound["rtol"], atol=atol)
