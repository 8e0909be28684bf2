"""The projector: widths, biases and state of the published ones, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bench import peers
from vicreg_kernels import Projector
from vicreg_kernels.projector import CONVENTIONS


def layers(module):
    """(inputs, outputs, bias) of the linear layers."""
    return [(m.in_features, m.out_features, m.bias is not None) for m in module.modules()
            if isinstance(m, nn.Linear)]  # fmt: skip


PUBLISHED = {
    "vicreg": [(10, 8192, True), (8192, 8192, True), (8192, 8192, False)],
    "barlow_twins": [(10, 8192, False), (8192, 8192, False), (8192, 8192, False)],
    "lightly": [(10, 8192, False), (8192, 8192, False), (8192, 8192, True)],
    "lightly_lejepa": [(10, 2048, False), (2048, 2048, False), (2048, 64, True)],
    "solo_learn": [(10, 2048, True), (2048, 2048, True), (2048, 2048, True)],
    "eb_jepa": [(10, 2048, True), (2048, 2048, False)],
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_published(name):
    with torch.device("meta"):
        projector = Projector(10, convention=name)
    assert layers(projector) == PUBLISHED[name]
    kinds = [type(m) for m in projector]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * (len(kinds) // 3) + [nn.Linear]
    assert "0.weight" in projector.state_dict()


def test_given_widths():
    projector = Projector(10, (6, 5, 4), convention="barlow_twins")
    assert layers(projector) == [(10, 6, False), (6, 5, False), (5, 4, False)]
    plain = nn.Sequential(
        nn.Linear(10, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(),
        nn.Linear(5, 4, bias=False),
    )  # fmt: skip
    plain.load_state_dict(projector.state_dict())
    x = torch.randn(7, 10)
    assert torch.equal(projector(x), plain(x))
    assert layers(Projector(10, [4])) == [(10, 4, False)]


def test_parts_and_copies():
    """Cut off the last layers, as probes do; the part is a plain nn.Sequential of them."""
    projector = Projector(10, (6, 5, 4))
    part = projector[:3]
    assert type(part) is nn.Sequential
    assert part[0] is projector[0]
    assert part(torch.randn(7, 10)).shape == (7, 6)
    assert layers(copy.deepcopy(projector)) == layers(projector)


@pytest.mark.parametrize(
    ("head", "convention"),
    [
        ("VICRegProjectionHead", "lightly"),
        ("BarlowTwinsProjectionHead", "lightly"),
        ("LeJEPAProjectionHead", "lightly_lejepa"),
    ],
)
def test_lightlys_heads(head, convention):
    with peers.importable("lightly"):
        try:
            from lightly.models.modules import heads
        except ImportError as error:
            pytest.skip(f"lightly cannot be imported: {error}")
        with torch.device("meta"):
            theirs, ours = getattr(heads, head)(10), Projector(10, convention=convention)
    assert layers(ours) == layers(theirs)
    names = [name.removeprefix("layers.") for name in theirs.state_dict()]
    assert list(ours.state_dict()) == names


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((10,), {"convention": "byol"}, ValueError, "convention: got 'byol', takes one of"),
        ((10, ()), {}, ValueError, "widths: got none"),
        ((10, 8192), {}, TypeError, "widths: got int, takes a list or tuple"),
        ((10, (6, 0)), {}, ValueError, "widths: got 0, takes at least 1"),
        ((10, (6, 2.0)), {}, TypeError, "widths: got float, takes int"),
        ((0,), {}, ValueError, "features: got 0, takes at least 1"),
        ((True,), {}, TypeError, "features: got bool, takes int"),
    ],
)
def test_refused_by_name(arguments, settings, error, message):
    with pytest.raises(error) as raised:
        Projector(*arguments, **settings)
    assert str(raised.value).startswith(message)
