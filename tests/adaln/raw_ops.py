"""Valid calls of the raw ops, which tests/helpers/raw_ops.py spoils in one argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# What may be otherwise, as VALID of the helper: any number of tokens, any strides.
VALID = {
    ("adaln_norm_forward", "x"): {"size 1"},
    ("adaln_norm_backward", "grad"): {"spread"},
    ("adaln_gate_backward", "grad"): {"spread"},
}


def calls(ops: Any) -> dict[str, list[Callable[[], list[Any]]]]:
    """Usual sizes, and dimensions of one element."""

    def drawn(*shape: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(shape, generator=generator) for _ in range(2))
        return [x, y, *torch.randn(shape[0], 2 * shape[2], generator=generator).chunk(2, dim=1)]

    def norm(*shape: int) -> list[Any]:
        x, _, shift, scale = drawn(*shape)
        return [x, shift, scale, 1e-2]

    def norm_backward(*shape: int) -> list[Any]:
        x, grad, _, scale = drawn(*shape)
        return [grad, x, scale, ops.adaln_norm_forward(*norm(*shape))[1], True, True]

    def gate(*shape: int) -> list[Any]:
        return drawn(*shape)[:3]

    def gate_backward(*shape: int) -> list[Any]:
        return [*gate(*shape), True, True]

    shapes = [(3, 5, 7), (1, 5, 1), (2, 1, 8)]
    made = {
        "norm_forward": norm,
        "norm_backward": norm_backward,
        "gate_forward": gate,
        "gate_backward": gate_backward,
    }
    return {
        f"adaln_{name}": [lambda make=make, shape=shape: make(*shape) for shape in shapes]
        for name, make in made.items()
    }
