"""The multilayer perceptron."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with GELU between."""
    layers: list[nn.Module] = []
    for inward, outward in pairwise(widths):
        layers += [nn.Linear(inward, outward), nn.GELU()]
    return nn.Sequential(*layers[:-1])
