"""The differences of two losses, in value and gradient, from each other and from float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# x, y: [N, D] -> a 0-d loss.
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Parity:
    """Relative differences: |a - b| / |b| of the loss, and max|a - b| / max|b| of the gradients
    over both views.

    between: the fused loss against the reference, both in the embeddings' dtype; truth: each
    against the reference in float64.
    """

    loss_between: float
    gradient_between: float
    loss_truth: dict[str, float]
    gradient_truth: dict[str, float]


def _evaluate(loss: Loss, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(value, gradients [2, N, D]), both float64."""
    x, y = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    value = loss(x, y)
    gradients = torch.stack(torch.autograd.grad(value, (x, y)))
    return value.detach().double(), gradients.double()


def _apart(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[float, float]:
    value = (a[0] - b[0]).abs() / b[0].abs()
    gradient = (a[1] - b[1]).abs().max() / b[1].abs().max()
    return value.item(), gradient.item()


def compare(losses: Mapping[str, Loss], x: Tensor, y: Tensor) -> Parity:
    """losses: "fused" and "reference"; x, y: [N, D]."""
    truth = _evaluate(losses["reference"], x.double(), y.double())
    results = {name: _evaluate(loss, x, y) for name, loss in losses.items()}
    errors = {name: _apart(value, truth) for name, value in results.items()}
    between = _apart(results["fused"], results["reference"])
    return Parity(
        *between,
        loss_truth={name: error[0] for name, error in errors.items()},
        gradient_truth={name: error[1] for name, error in errors.items()},
    )


def worst(moments: Sequence[Parity]) -> Parity:
    """The largest of each figure; NaN if one of them is NaN."""
    names = moments[0].loss_truth
    return Parity(
        _largest(m.loss_between for m in moments),
        _largest(m.gradient_between for m in moments),
        {name: _largest(m.loss_truth[name] for m in moments) for name in names},
        {name: _largest(m.gradient_truth[name] for m in moments) for name in names},
    )


def _largest(values: Iterable[float]) -> float:
    return torch.tensor(list(values), dtype=torch.float64).max().item()
