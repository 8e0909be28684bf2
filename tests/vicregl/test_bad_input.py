"""Bad input of VICRegL: the error names the argument, what it got and what it takes, and comes
before anything runs.
"""

from __future__ import annotations

import re

import pytest
import torch

from tests.helpers.recorded_ops import RecordedOps
from vicreg_kernels.vicregl import VICRegLLoss, vicregl_loss, vicregl_terms


def z(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


E, M, G = [z(3, 6), z(3, 6)], [z(3, 5, 5, 4), z(3, 5, 5, 4)], [z(3, 5, 5, 2), z(3, 5, 5, 2)]
# name: (embeddings, maps, grids, exception, argument, words)
TENSORS = {
    "a tensor": (E[0], M, G, TypeError, "embeddings", ["Tensor", "sequence"]),
    "none": (E, None, G, TypeError, "maps", ["NoneType"]),
    "no grids": (E, M, None, TypeError, "grids", ["NoneType"]),
    "one view": (E[:1], M, G, ValueError, "embeddings", ["1 views", "at least 2"]),
    "a number": ([E[0], 1.0], M, G, TypeError, "embeddings[1]", ["float"]),
    "whole numbers": (E, [M[0].int(), M[1]], G, TypeError, "maps[0]", ["int32", "bfloat16"]),
    "dtype": (E, [M[0], M[1].half()], G, TypeError, "maps[1]", ["float16", "float32"]),
    "dtypes": (E, [m.half() for m in M], G, TypeError, "maps", ["float16", "embeddings"]),
    "grid dtype": (E, M, [g.long() for g in G], TypeError, "grids[0]", ["int64"]),
    "sparse": ([E[0].to_sparse(), E[1]], M, G, TypeError, "embeddings[0]", ["sparse"]),
    "dimensions": ([z(3, 6, 1), E[1]], M, G, ValueError, "embeddings[0]", ["(3, 6, 1)", "[B, D]"]),
    "map dimensions": (E, [z(3, 4), M[1]], G, ValueError, "maps[0]", ["(3, 4)", "[B, L, C]"]),
    "empty": ([z(0, 6), E[1]], M, G, ValueError, "embeddings[0]", ["no elements"]),
    "batch": ([E[0], z(4, 6)], M, G, ValueError, "embeddings[1]", ["4", "3"]),
    "map batch": (E, [z(4, 5, 5, 4)] * 2, G, ValueError, "maps", ["4", "embeddings, 3"]),
    "grid batch": (E, M, [z(2, 5, 5, 2)] * 2, ValueError, "grids", ["2", "maps, 3"]),
    "channels": (E, [M[0], z(3, 5, 5, 3)], G, ValueError, "maps[1]", ["3", "4"]),
    "views": (E, [*M, M[0]], [*G, G[0]], ValueError, "maps", ["3 views", "embeddings, 2"]),
    "grid views": (E, M, [*G, G[0]], ValueError, "grids", ["3 views", "maps, 2"]),
    "coordinates": (E, M, [z(3, 5, 5, 3)] * 2, ValueError, "grids[0]", ["(3, 5, 5, 3)"]),
    "positions": (E, M, [G[0], z(3, 5, 4, 2)], ValueError, "grids[1]", ["20", "25"]),
    "device": (E, [M[0], M[1].to("meta")], G, ValueError, "maps[1]", ["meta", "cpu"]),
    "devices": (E, [m.to("meta") for m in M], G, ValueError, "maps", ["meta", "cpu"]),
    "grid device": (E, M, [g.to("meta") for g in G], ValueError, "grids", ["meta", "cpu"]),
    "one sample": (
        [e[:1] for e in E], [m[:1] for m in M], [g[:1] for g in G], ValueError, "embeddings",
        ["batch of 1", "at least 2"],
    ),
    "few positions": (
        E, [z(3, 3, 3, 4)] * 2, [z(3, 3, 3, 2)] * 2, ValueError, "num_matches", ["20", "9", "None"],
    ),
}  # fmt: skip
# name: (settings, exception, argument, words)
SETTINGS = {
    "alpha": ({"alpha": 1.5}, ValueError, "alpha", ["1.5", "0 to 1"]),
    "alpha nan": ({"alpha": float("nan")}, ValueError, "alpha", ["nan"]),
    "one count": ({"num_matches": (20,)}, ValueError, "num_matches", ["1", "two"]),
    "count": ({"num_matches": 20}, TypeError, "num_matches", ["int", "two"]),
    "words": ({"num_matches": "20"}, TypeError, "num_matches", ["str"]),
    "fraction": ({"num_matches": (2.5, 4)}, TypeError, "num_matches", ["2.5", "None"]),
    "zero": ({"num_matches": (20, 0)}, ValueError, "num_matches", ["0", "at least 1"]),
    "order": ({"match_order": "nearest"}, ValueError, "match_order", ["nearest", "distance"]),
    "covariance": ({"covariance": "all"}, ValueError, "covariance", ["'all'", "last_view"]),
    "last view": ({"covariance": "last_view"}, ValueError, "covariance", ["fast_vc_reg"]),
    "weight": ({"variance_weight": float("inf")}, ValueError, "variance_weight", ["inf"]),
    "margin": ({"margin": -1.0}, ValueError, "margin", ["-1"]),
    "eps": ({"eps": float("nan")}, ValueError, "eps", ["nan"]),
    "backend": ({"backend": "gpu"}, ValueError, "backend", ["gpu", "reference"]),
}


def refuse(function, exception, argument, words):
    with RecordedOps() as ops, pytest.raises(exception) as caught:
        function()
    assert not ops.calls
    message = str(caught.value)
    assert re.match(rf"{re.escape(argument)}:", message), message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name, backend):
    embeddings, maps, grids, *rest = TENSORS[name]
    for function in (vicregl_loss, vicregl_terms, VICRegLLoss(backend=backend)):
        settings = {} if isinstance(function, VICRegLLoss) else {"backend": backend}
        refuse(lambda f=function, s=settings: f(embeddings, maps, grids, **s), *rest)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    settings, *rest = SETTINGS[name]
    refuse(lambda: vicregl_loss(E, M, G, **settings), *rest)
    refuse(lambda: vicregl_terms(E, M, G, **settings), *rest)
    refuse(lambda: VICRegLLoss(**settings), *rest)


def test_small_views_are_searched_with_the_second_count():
    """Four matches from a map of nine positions: 20 would be too many, and is not asked of it."""
    maps, grids = [*M, z(3, 3, 3, 4)], [*G, z(3, 3, 3, 2)]
    assert vicregl_loss([*E, z(3, 6)], maps, grids).isfinite()
    refuse(
        lambda: vicregl_loss([*E, z(3, 6)], maps, grids, num_matches=(20, 10)),
        ValueError,
        "num_matches",
        ["10", "9"],
    )


def test_half_that_is_left_out_is_not_looked_at():
    assert vicregl_loss(E, "no", None, alpha=1.0).isfinite()
    assert vicregl_loss(None, M, G, alpha=0.0).isfinite()


def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="float64"):
        vicregl_loss(*([z.double() for z in zs] for zs in (E, M, G)), backend="cpu")


def test_a_setting_that_is_none():
    refuse(lambda: vicregl_terms(E, M, G, alfa=0.5), TypeError, "alfa", ["alpha", "num_matches"])


def test_process_group_is_checked():
    with pytest.raises(TypeError, match="process_group: got int"):
        vicregl_loss(E, M, G, process_group=3)
