"""ResNet-18 (He et al., 2016, arXiv:1512.03385), of any width, for images of two sizes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vicreg_jepa.models.conv import RELU

GROUPS, BLOCKS = 4, 2  # each group doubles the width and, but for the first, halves the map
WIDENING = 2 ** (GROUPS - 1)  # features for a channel of the first map


class Block(nn.Module):
    """Two 3 x 3 convolutions beside an identity, or a 1 x 1 convolution where the shape changes."""

    def __init__(
        self, inward: int, outward: int, stride: int, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inward, outward, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outward),
            activation(),
            nn.Conv2d(outward, outward, 3, padding=1, bias=False),
            nn.BatchNorm2d(outward),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inward != outward:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inward, outward, 1, stride=stride, bias=False), nn.BatchNorm2d(outward)
            )
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.residual(x) + self.shortcut(x))


class ResNet18(nn.Sequential):
    """[N, channels, H, W] -> [N, features], the mean over positions of the last map.

    features: a multiple of 8; 512 is the published width. small: for images of about 32 pixels the
    first convolution is 3 x 3 with stride 1, without a pooling after it.
    """

    def __init__(
        self,
        channels: int,
        features: int = 512,
        activation: Callable[[], nn.Module] = RELU,
        *,
        small: bool = False,
    ) -> None:
        width = features // WIDENING
        kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, kernel, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(width),
            activation(),
        ]
        if not small:
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
        for group in range(GROUPS):
            for block in range(BLOCKS):
                first = block == 0 and group > 0
                outward = width * 2 if first else width
                layers.append(Block(width, outward, 2 if first else 1, activation))
                width = outward
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        self.features = features
