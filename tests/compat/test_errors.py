"""What the drop-in modules refuse: the type of error of the library whose name it has, where it
raises one, and a message that begins with that library's name of the argument.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench import peers

X = torch.randn(6, 4)
VIEWS = torch.randn(2, 6, 4)


def vicregl_views(count=2, grids=None):
    features = [(torch.randn(6, 4), torch.randn(6, 2, 2, 3)) for _ in range(count)]
    return features, [torch.rand(6, 2, 2, 2) for _ in range(count if grids is None else grids)]


# (library, call, error, start of the message, whether the library itself raises that error)
BAD = [
    ("lightly", lambda g: g("VICRegLoss")()(X[:1], X[:1]), AssertionError, "z_a: got 1 rows", True),
    ("lightly", lambda g: g("VICRegLoss")()(X, X[:, :3]), AssertionError, "z_b: got shape", True),
    ("lightly", lambda g: g("VICRegLoss")()(X.int(), X.int()), TypeError, "z_a: got dtype", False),
    ("lightly", lambda g: g("VICRegLoss")(mu_param="no")(X, X), TypeError, "mu_param: got", False),
    ("lightly", lambda g: g("VICRegLoss")(eps=-1.0)(X, X), ValueError, "eps: got -1.0", False),
    ("lightly", lambda g: g("VICRegLoss")()([1], X), TypeError, "z_a: got list", False),
    ("lightly", lambda g: g("BarlowTwinsLoss")()(X[:1], X[:1]), ValueError, "z_a: got 1 r", True),
    ("lightly", lambda g: g("BarlowTwinsLoss")(None)(X, X.double()), TypeError, "z_b: g", False),
    ("lightly", lambda g: g("SIGReg")(knots=1), ValueError, "knots: got 1", True),
    ("lightly", lambda g: g("SIGReg")(t_max=0.0), ValueError, "t_max: got 0.0", True),
    ("lightly", lambda g: g("SIGReg")(num_vectors=0), ValueError, "num_vectors: got 0", True),
    ("lightly", lambda g: g("SIGReg")()(VIEWS.int()), TypeError, "proj: got dtype", False),
    ("lightly", lambda g: g("LeJEPALoss")(1.1), ValueError, "lambda_param: got 1.1", True),
    (
        "lightly",
        lambda g: g("LeJEPALoss")()(local_proj=X, global_proj=VIEWS),
        ValueError,
        "local_proj: got shape (6, 4)",
        True,
    ),
    (
        "lightly",
        lambda g: g("LeJEPALoss")()(local_proj=VIEWS[:0], global_proj=VIEWS),
        ValueError,
        "local_proj: got shape (0, 6, 4)",
        True,
    ),
    (
        "lightly",
        lambda g: g("LeJEPALoss")()(local_proj=VIEWS[:, :3], global_proj=VIEWS),
        ValueError,
        "local_proj: got shape (2, 3, 4)",
        True,
    ),
    (
        "lightly",
        lambda g: g("VICRegLLoss")()(*vicregl_views(2, 3)),
        ValueError,
        "global_view_grids: got 3 views",
        True,
    ),
    (
        "lightly",
        lambda g: g("VICRegLLoss")()(*vicregl_views(), *vicregl_views(1, 2)),
        ValueError,
        "local_view_grids: got 2 views",
        True,
    ),
    (
        "lightly",
        lambda g: g("VICRegLLoss")()(*vicregl_views(), vicregl_views(1)[0]),
        ValueError,
        "local_view_grids: got None",
        True,
    ),
    (
        "lightly",
        lambda g: g("VICRegLLoss")()(*vicregl_views(3)),
        ValueError,
        "global_view_features: got 3 views",
        False,
    ),
    (
        "lightly",
        lambda g: g("update_momentum")(nn.Linear(3, 3), nn.Linear(3, 4), 0.9),
        ValueError,
        "model[0]: got shape (3, 3), takes model_ema[0]'s (4, 3)",
        False,
    ),
    (
        "lightly",
        lambda g: g("update_momentum")(nn.Linear(3, 3), nn.Linear(3, 3), 1.5),
        ValueError,
        "m: got 1.5",
        False,
    ),
    ("solo_learn", lambda g: g("vicreg_loss_func")(X, X[:3]), ValueError, "z2: got shape", False),
    ("solo_learn", lambda g: g("vicreg_loss_func")(X[0], X[0]), ValueError, "z1: got sh", True),
    ("solo_learn", lambda g: g("barlow_loss_func")(X[:1], X[:1]), ValueError, "z1: got 1", True),
    (
        "solo_learn",
        lambda g: g("barlow_loss_func")(X, X, lamb=float("nan")),
        ValueError,
        "lamb: got nan",
        False,
    ),
    ("solo_learn", lambda g: g("MomentumUpdater")(1.1), AssertionError, "base_tau: got 1.1", True),
    (
        "solo_learn",
        lambda g: g("MomentumUpdater")(0.9, 0.5),
        AssertionError,
        "base_tau: got 0.9",
        True,
    ),
    (
        "stable_pretraining",
        lambda g: g("VICRegLoss")(epsilon=-1.0)(X, X),
        ValueError,
        "epsilon: got -1.0",
        False,
    ),
    ("stable_pretraining", lambda g: g("VCRegLoss")()(X[:1]), ValueError, "z_i: got 1", False),
    (
        "stable_pretraining",
        lambda g: g("BarlowTwinsLoss")()(X, X.double()),
        TypeError,
        "z_j: got dtype torch.float64, takes z_i's dtype torch.float32",
        False,
    ),
    (
        "stable_pretraining",
        lambda g: g("SlicedEppsPulley")(n_points=4),
        AssertionError,
        "n_points: got 4",
        True,
    ),
    ("stable_worldmodel", lambda g: g("SIGReg")()(VIEWS[:, :1]), ValueError, "proj: got 1", False),
    ("eb_jepa", lambda g: g("VICRegLoss")()(X[:, :1], X[:, :1]), ValueError, "z1: got D", False),
    ("eb_jepa", lambda g: g("CovarianceLoss")()(X[:1]), ValueError, "x: got 1 rows", False),
    ("eb_jepa", lambda g: g("BCS")()(X, X[:3]), ValueError, "z2: got shape (3, 4)", False),
    *(
        ("pytorch_metric_learning", lambda g, b=b: g("VICRegLoss")()(X, **b), ValueError, m, True)
        for b, m in (
            ({"labels": torch.arange(6)}, "labels: got Tensor"),
            ({"ref_emb": X, "ref_labels": torch.arange(6)}, "ref_labels: got Tensor"),
            ({"indices_tuple": (X, X, X)}, "indices_tuple: got tuple"),
        )
    ),
    *(
        ("pytorch_metric_learning", lambda g, b=b: g("VICRegLoss")(**b), e, m, theirs)
        for b, e, m, theirs in (
            ({"distance": None}, ValueError, "distance: got None", True),
            ({"embedding_regularizer": 1}, ValueError, "embedding_regularizer: got 1", True),
            ({"reducer": nn.Identity()}, ValueError, "reducer: got Identity()", False),
            ({"collect_stats": True}, ValueError, "collect_stats: got True", False),
            ({"other": None}, TypeError, "other: VICRegLoss has no such argument", True),
        )
    ),
    (
        "pytorch_metric_learning",
        lambda g: g("VICRegLoss")()(X, ref_emb=X[:, :3]),
        ValueError,
        "ref_emb: got shape (6, 3), takes embeddings's shape (6, 4)",
        False,
    ),
    ("pyjepa", lambda g: g("VICRegLoss")()(X, X[:3]), ValueError, "y: got shape", False),
    ("pyjepa", lambda g: g("VICRegLoss")()(X[:1]), ValueError, "x: got 1 rows", False),
    ("jepa_science", lambda g: g("sigreg_loss")(X[0]), ValueError, "embeddings: got sha", True),
    ("jepa_science", lambda g: g("sigreg_loss")(X, n_knots=4), ValueError, "n_knots: g", True),
    ("jepa_science", lambda g: g("sigreg_loss")(X, t_max=0.0), ValueError, "t_max: got", True),
    (
        "jepa_science",
        lambda g: g("sigreg_loss")(X, reduction="max"),
        ValueError,
        "reduction: got 'max'",
        True,
    ),
    (
        "jepa_science",
        lambda g: g("SIGReg")(reduction="none"),
        ValueError,
        "reduction: got 'none'",
        False,
    ),
]


@pytest.mark.parametrize(("peer", "call", "error", "message", "too"), BAD)
def test_refused_by_name(peer, call, error, message, too):
    with pytest.raises(error) as raised:
        call(peers.ours(peer))
    assert type(raised.value) is error
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(("peer", "call", "error", "message", "too"), BAD)
def test_refused_by_the_library_too(peer, call, error, message, too):
    with peers.importable(peer):
        try:
            get = peers.theirs(peer)
        except ImportError as missing:
            pytest.skip(f"{peer} cannot be imported: {missing}")
        if too:
            with pytest.raises(error):
                call(get)


@pytest.mark.parametrize("name", ["VICRegLoss", "VICRegLLoss", "BarlowTwinsLoss", "SIGReg"])
def test_gathering_without_torch_distributed(name, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gather_distributed: got True, but this torch is built"):
        peers.ours("lightly")(name)(gather_distributed=True)


def test_gathering_without_a_group_is_local():
    """As lightly's: torch.distributed is there, but no group."""
    for name in ("VICRegLoss", "BarlowTwinsLoss"):
        one, other = (peers.ours("lightly")(name)(gather_distributed=g) for g in (True, False))
        assert one(X, X.flip(0)) == other(X, X.flip(0))
