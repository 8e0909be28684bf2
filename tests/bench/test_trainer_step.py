"""A V-JEPA 2-style step written with this library's ops equals the same step in plain PyTorch:
loss, every gradient, and the teacher after its update.
"""

from __future__ import annotations

import copy

import pytest
import torch

from bench.jepa_step import Masks, Size, Step
from tests.helpers.recorded_ops import RecordedOps

SMALL = Size(
    frames=8, side=32, patch=8, dim=96, heads=3, depth=2, predictor_dim=96, predictor_heads=3,
    predictor_depth=2,
)  # fmt: skip


def clip(device: str) -> torch.Tensor:
    return torch.randn(3, 3, 8, 32, 32).to(device)


@pytest.fixture
def step(fused):
    torch.manual_seed(0)
    # the cuda backend's attention takes half types; None picks triton's there
    backend = None if fused.name == "cuda" else fused.name
    step = Step(SMALL, backend).to(fused.device)
    # a first update moves the teacher off the encoder
    with torch.no_grad():
        for parameter in step.teacher.parameters():
            parameter.mul_(0.9)
    return step


def test_masks_are_tubes_of_different_lengths():
    masks = Masks.tubes(SMALL, batch=5, kept=(8, 40))
    assert len({part.numel() for part in masks.context}) > 1
    for context, target in zip(masks.context, masks.target, strict=True):
        both = torch.cat((context, target)).sort().values
        assert torch.equal(both, torch.arange(SMALL.tokens))
        frames = context.view(SMALL.grid[0], -1)
        assert torch.equal(frames % 16, frames[:1].expand_as(frames) % 16)


def test_step_equals_plain(fused, step):
    plain = copy.deepcopy(step)
    masks = Masks.tubes(SMALL, batch=3, kept=(8, 40))
    video = clip(fused.device)
    with RecordedOps() as ops:
        loss = step.fused(video, masks)
    expected = plain.plain(video, masks)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for (name, mine), theirs in zip(step.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7, msg=name)
        if name.startswith("teacher."):
            assert mine.grad is None
            continue
        size = theirs.grad.abs().max()
        assert size > 0, name
        torch.testing.assert_close(
            mine.grad / size, theirs.grad / size, rtol=1e-4, atol=1e-5, msg=name
        )
    called = {name for name, _ in ops.calls}
    assert {"attention_forward", "attention_backward"} <= called
    assert {name.split("_")[0] for name in called} == {"attention", "tokens", "ema"}
