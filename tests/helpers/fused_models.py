"""A model of another library whose attention is this library's, against itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.recorded_ops import RecordedOps

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
Run = Callable[[nn.Module], tuple[Tensor, ...]]


def outcome(model: nn.Module, run: Run) -> tuple[tuple[Tensor, ...], dict[str, Tensor | None]]:
    """Outputs, and the gradient of every parameter that wants one."""
    outputs = run(model)
    loss = sum((out * torch.linspace(-1, 1, out.shape[-1])).sum() for out in outputs)
    named = [(name, z) for name, z in model.named_parameters() if z.requires_grad]
    names, parameters = zip(*named, strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return outputs, dict(zip(names, gradients, strict=True))


def assert_same(model: nn.Module, fused: nn.Module, run: Run) -> list[tuple[str, Any]]:
    """Their outputs and gradients are close, and the attention is fused. Returns the ops' calls."""
    expected, expected_gradients = outcome(model, run)
    with RecordedOps() as ops:
        actual, gradients = outcome(fused, run)
    names = [name for name, _ in ops.calls]
    assert "attention_forward" in names
    assert "attention_backward" in names
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    # A key's bias moves all scores of a query alike: without rotation its gradient is rounding,
    # which is held to twice float32's of the largest gradient.
    largest = max(g.abs().max() for g in expected_gradients.values() if g is not None)
    for name, theirs in expected_gradients.items():
        if theirs is None:
            assert gradients[name] is None, name
            continue
        size = torch.maximum(theirs.abs().max(), 1e-2 * largest)
        torch.testing.assert_close(gradients[name] / size, theirs / size, **CLOSE, msg=name)
    return ops.calls
