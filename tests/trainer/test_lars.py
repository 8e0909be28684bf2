"""LARS against its formula in float64; it needs neither timm nor torchvision."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from vicreg_jepa import config
from vicreg_jepa.methods import build
from vicreg_jepa.training import checkpoint, optimizers
from vicreg_jepa.training.optimizers import LARS

RATE, MOMENTUM, TRUST, DECAY = 0.3, 0.9, 0.001, 0.05


def literal(weights, gradients, decay: float, cap: bool = False) -> torch.Tensor:
    """You, Gitman and Ginsburg (2017), algorithm 1, step by step in float64; with cap as solo-learn
    changes it.
    """
    w, v = weights.double(), torch.zeros_like(weights, dtype=torch.float64)
    for g in gradients:
        g = g.double()
        rate = RATE
        if decay:
            norms = w.norm(), g.norm()
            if norms[0] > 0 and norms[1] > 0:
                trust = float(TRUST * norms[0] / (norms[1] + decay * norms[0]))
                rate = min(trust, RATE) if cap else RATE * trust
        v = MOMENTUM * v + rate / RATE * (g + decay * w)
        w = w - RATE * v
    return w


@pytest.mark.parametrize("start", [1.0, 0.0, 1e-20, 1e15])
@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("cap", [False, True])
def test_it_is_the_published_rule(start, decay, cap):
    weights = torch.randn(7, 5) * start
    gradients = [torch.randn(7, 5) for _ in range(4)]
    gradients[2].zero_()
    made = nn.Parameter(weights.clone())
    optimizer = LARS([{"params": [made], "weight_decay": decay}], lr=RATE, cap_trust=cap)
    for gradient in gradients:
        made.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(made.grad, gradient)
    expected = literal(weights, gradients, decay, cap)
    torch.testing.assert_close(made.detach().double(), expected, rtol=1e-5, atol=1e-9)


def test_timm_gives_the_same(monkeypatch):
    """Its file alone: the package needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("needs timm")
    package = ModuleType("timms")
    package.__path__ = [str(Path(spec.origin).parent / "optim")]
    monkeypatch.setitem(sys.modules, "timms", package)
    Lars = importlib.import_module("timms.lars").Lars
    weights, ours, theirs = torch.randn(6, 4), *(nn.Parameter(torch.zeros(6, 4)) for _ in "ab")
    made = []
    for parameter, kind, words in ((ours, LARS, {}), (theirs, Lars, {"momentum": 0.9})):
        parameter.data.copy_(weights)
        made.append(kind([{"params": [parameter], "weight_decay": DECAY}], lr=RATE, **words))
    for seed in range(5):
        torch.manual_seed(seed)
        gradient = torch.randn(6, 4)
        for parameter, optimizer in zip((ours, theirs), made, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_it_needs_neither_timm_nor_torchvision(monkeypatch):
    for name in [*(n for n in sys.modules if n.split(".")[0] == "timm"), "timm", "torchvision"]:
        monkeypatch.setitem(sys.modules, name, None)
    method = build.method(config.load("vicreg_digits", ["model.dim=8", "model.expander=[8,8]"]), 1)
    optimizer = optimizers.build(config.Optimizer(name="lars"), method)
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert parameters == {id(p) for p in method.parameters()}


def test_a_parameter_without_a_gradient_stays_and_the_state_travels():
    still, moved = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    groups = [{"params": [still, moved], "weight_decay": DECAY}]
    first = LARS(groups, lr=RATE)
    moved.grad = torch.ones(2, 2)
    first.step()
    assert torch.equal(still.detach(), torch.ones(2, 2))
    tensors: dict[str, torch.Tensor] = {}
    state = checkpoint.flatten("optimizer", first.state_dict(), tensors)
    tensors = {name: z.clone() for name, z in tensors.items()}
    copies = [nn.Parameter(p.detach().clone()) for p in (still, moved)]
    second = LARS([{"params": copies, "weight_decay": DECAY}], lr=RATE)
    second.load_state_dict(checkpoint.unflatten(state, tensors))
    copies[1].grad = moved.grad.clone()
    for optimizer in (first, second):
        optimizer.step()
    assert torch.equal(copies[1], moved)
