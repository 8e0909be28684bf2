"""The same weights after 100 updates as timm's and torch's own EMA."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vicreg_kernels.ema import EMA


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Linear(9, 5))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randn(16, 6)
    loss = (model(x) - x[:, :5]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def assert_close(ema: EMA, peer: nn.Module) -> None:
    state, expected = ema.module.state_dict(), peer.state_dict()
    assert state.keys() == expected.keys()
    for name, z in state.items():
        torch.testing.assert_close(z, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def model_ema_v3() -> type:
    """timm's class, loaded by path: importing timm needs torchvision."""
    package = importlib.util.find_spec("timm")
    if package is None or not package.submodule_search_locations:
        pytest.skip("timm is not installed")
    path = Path(package.submodule_search_locations[0]) / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("_timm_model_ema", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelEmaV3


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.9998])
def test_timm(decay, counted):
    """Told the step, it copies in the first two updates."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    ours, theirs = EMA(model, decay, buffers="average"), model_ema_v3()(model, decay=decay)
    for step in range(100):
        train(model, optimizer)
        ours.update(model, momentum=0.0 if counted and step < 2 else None)
        theirs.update(model, **({"step": step} if counted else {}))
    assert_close(ours, theirs.module)
    resumed = EMA(make())
    resumed.load_state_dict(theirs.state_dict())
    assert_close(resumed, theirs.module)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.9998])
def test_averaged_model(decay, buffers):
    """Its first update copies, so ours does; without use_buffers it copies buffers."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=buffers)
    ours = EMA(model, decay, buffers="average" if buffers else "copy")
    for step in range(100):
        train(model, optimizer)
        ours.update(model, momentum=0.0 if step == 0 else None)
        theirs.update_parameters(model)
    parameters = dict(ours.module.named_parameters())
    for name, z in theirs.module.named_parameters():
        torch.testing.assert_close(parameters[name], z, rtol=1e-5, atol=1e-6)
    for name, z in ours.module.named_buffers():
        if buffers and z.is_floating_point():
            theirs_too = theirs.module.get_buffer(name)
            torch.testing.assert_close(z, theirs_too, rtol=1e-5, atol=1e-6)
        elif not buffers:  # theirs copies what it is told not to average
            assert torch.equal(z, theirs.module.get_buffer(name))
    resumed = EMA(make())
    resumed.load_state_dict(theirs.state_dict())
    assert resumed.step == 100
    assert_close(resumed, theirs.module)
