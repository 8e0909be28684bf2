"""The networks: an encoder whose features are kept, an expander that only the loss sees."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

from torch import nn

RELU = partial(nn.ReLU, inplace=True)
# A unit at ReLU's kink is on or off by rounding: runs 1e-7 apart part within a hundred steps, by
# 1e-3 to 1e-2 of the loss. With GELU the same runs stay 1e-6 apart.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": RELU, "gelu": nn.GELU}


class ConvEncoder(nn.Sequential):
    """Three 3 x 3 convolutions and a mean over positions: [N, channels, H, W] -> [N, features]."""

    def __init__(
        self, channels: int, features: int = 128, activation: Callable[[], nn.Module] = RELU
    ) -> None:
        widths = (channels, features // 4, features // 2, features)
        layers: list[nn.Module] = []
        for depth, (inward, outward) in enumerate(pairwise(widths)):
            stride = 2 if depth == 1 else 1
            layers += [
                nn.Conv2d(inward, outward, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(outward),
                activation(),
            ]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.features = features


class Expander(nn.Sequential):
    """VICReg's three-layer expander: [N, features] -> [N, dim].

    The published one is as wide inside as outside; `hidden` sets the inner width by itself. A
    batch norm takes out the bias before it, whose gradient would be rounding alone: there is none.
    """

    def __init__(
        self, features: int, hidden: int, dim: int, activation: Callable[[], nn.Module] = RELU
    ) -> None:
        super().__init__(
            nn.Linear(features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            activation(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            activation(),
            nn.Linear(hidden, dim, bias=False),
        )


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
