"""The convolutional encoder, and the expander, which only the loss uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

from torch import nn

RELU = partial(nn.ReLU, inplace=True)
# At ReLU's kink rounding decides whether a unit is on or off: the losses of two runs that differ by
# 1e-7 differ by 1e-3 to 1e-2 within a hundred steps. With GELU the difference stays at 1e-6.
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

    The published expander has the same inner and outer width; here `hidden` sets the inner width.
    The layers before a batch norm have no bias: the norm would cancel it, and its gradient would be
    only rounding errors.
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
