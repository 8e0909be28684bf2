"""facebookresearch's ijepa, jepa and vjepa2: `apply_masks`, and the lines of docs/drop_in.md for
what their training loops compute in place. Where one of the repositories is on the path, against
its own function.
"""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vicreg_kernels as vk
from bench import peers
from vicreg_kernels.compat.meta_jepa import apply_masks


def plain(x, masks):
    """Row by row."""
    return [torch.stack([row[at] for row, at in zip(x, mask, strict=True)]) for mask in masks]


def masks(sizes=(4, 4), tokens=9):
    return [torch.stack([torch.randperm(tokens)[:size] for _ in range(3)]) for size in sizes]


def test_apply_masks():
    x = torch.randn(3, 9, 16, requires_grad=True)
    given = masks()
    found = apply_masks(x, given)
    expected = torch.cat(plain(x, given))
    assert torch.equal(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((z * weights).sum(), x)[0] for z in (found, expected)]
    torch.testing.assert_close(*gradients)
    given = masks((2, 5))
    for mine, theirs in zip(apply_masks(x, given, concat=False), plain(x, given), strict=True):
        assert torch.equal(mine, theirs)


def test_the_repository_s_own():
    try:
        theirs = peers.theirs("meta_jepa")("apply_masks")
    except ImportError as error:
        pytest.skip(f"none of the repositories is on the path: {error}")
    x, given = torch.randn(3, 9, 16), masks()
    assert torch.equal(apply_masks(x, given), theirs(x, given))
    home = importlib.import_module("src.masks.utils")
    with vk.patch("meta_jepa"):
        assert home.apply_masks is apply_masks
    assert home.apply_masks is theirs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.tensor([[9], [0], [0]])], "masks: got"),
        ([torch.tensor([[0]])], "masks: got"),
        ([torch.rand(3, 2)], "masks: got dtype"),
        ([], "masks: got none"),
        (masks((2, 5)), r"masks: got \[2, 5\] places to join, takes equally many"),
        (None, "masks: got NoneType, takes a list"),
    ],
)
def test_refused_by_name(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        apply_masks(torch.randn(3, 9, 16), given)


SOURCE = {
    "masks/utils": "def apply_masks(x, masks):\n    return None\n",
    "models": "from . import masks\n\napply_masks = masks.utils.apply_masks\n",
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """One that calls itself src, without __init__ files."""
    saved = {n: sys.modules.pop(n) for n in [*sys.modules] if n.split(".")[0] == "src"}
    for name, text in SOURCE.items():
        file = tmp_path / "src" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "src"]:
        del sys.modules[name]
    sys.modules.update(saved)


def test_patch(repository):
    importlib.import_module("src.masks.utils")
    models = importlib.import_module("src.models")
    theirs = models.apply_masks
    report = vk.patch("meta_jepa")
    assert report.places == {"apply_masks": ("src.masks.utils", "src.models")}
    assert models.apply_masks is apply_masks
    vk.unpatch("meta_jepa")
    assert models.apply_masks is theirs


def test_the_momentum_update():
    encoder = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    target = copy.deepcopy(encoder)
    for z in encoder.parameters():
        z.data = torch.randn_like(z)
    expected = [
        0.99 * t.detach() + 0.01 * z.detach()
        for t, z in zip(target.parameters(), encoder.parameters(), strict=True)
    ]
    vk.ema_update_(list(target.parameters()), list(encoder.parameters()), 0.99)
    for found, wanted in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted)


def test_the_losses():
    """I-JEPA's smooth L1 of four targets and one context; V-JEPA's mean over masks of L1."""
    h, given = torch.randn(3, 9, 16), masks((4, 4, 4, 4))
    normed = F.layer_norm(h, (16,))
    z = torch.randn(12, 4, 16, requires_grad=True)
    same = [(vk.prediction_loss(z, h, given), F.smooth_l1_loss(z, torch.cat(plain(normed, given))))]
    given = masks((2, 5))
    parts = [torch.randn(3, size, 16, requires_grad=True) for size in (2, 5)]
    absolute = [(p - t).abs().mean() for p, t in zip(parts, plain(normed, given), strict=True)]
    same.append((vk.prediction_loss(parts, h, given, kind="l1"), sum(absolute) / 2))
    for (found, expected), inputs in zip(same, ([z], parts), strict=True):
        torch.testing.assert_close(found, expected)
        for mine, theirs in zip(
            torch.autograd.grad(found, inputs),
            torch.autograd.grad(expected, inputs),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)
