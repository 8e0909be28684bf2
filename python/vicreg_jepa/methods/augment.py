"""Random views of a batch of images, drawn independently for each image without a loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Augment:
    """The strengths; the defaults suit small handwritten digits, whose class a flip would change.

    rotation: degrees, either way; shift: fraction of the image's edge, either way; zoom: largest
    enlargement, and its inverse the largest reduction; shear: as a slope, either way; contrast:
    largest relative change; noise: largest standard deviation; erase: largest edge of the erased
    rectangle, as a fraction of the image's.
    """

    rotation: float = 20.0
    shift: float = 0.125
    zoom: float = 1.3
    shear: float = 0.3
    contrast: float = 0.3
    noise: float = 0.15
    erase: float = 0.5

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """images: [N, C, H, W] in [0, 1] -> a view of the same shape.

        The numbers are drawn on the generator's device: a CPU generator gives the same views on
        every device.
        """
        return self._erase(self._tones(self._warp(images, generator), generator), generator)

    def _warp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        angle, log_zoom, shear, down, right = _uniform(5, images, generator)  # each [N]
        angle = angle * math.radians(self.rotation)
        zoom = torch.exp(log_zoom * math.log(self.zoom))
        shear = shear * self.shear
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        # affine_grid's coordinates span 2 over an edge, hence twice the fraction.
        rows = (
            torch.stack((cos, shear * cos - sin, 2 * self.shift * right), dim=-1),
            torch.stack((sin, shear * sin + cos, 2 * self.shift * down), dim=-1),
        )
        theta = torch.stack(rows, dim=-2)  # [N, 2, 3]
        # In float64, which autocast leaves alone: in bfloat16 a place would have eight bits.
        grid = functional.affine_grid(theta.double(), list(images.shape), align_corners=False)
        grid = grid.to(images.dtype)
        return functional.grid_sample(images, grid, padding_mode="zeros", align_corners=False)

    def _tones(self, images: Tensor, generator: torch.Generator) -> Tensor:
        contrast, noise = _uniform(2, images, generator).view(2, -1, 1, 1, 1)
        grain = torch.randn(images.shape, generator=generator, device=generator.device)
        grain = grain.to(images.device)
        images = images * (1 + self.contrast * contrast) + self.noise * noise.abs() * grain
        return images.clamp(0.0, 1.0)

    def _erase(self, images: Tensor, generator: torch.Generator) -> Tensor:
        height, width = images.shape[-2:]
        top, left, tall, wide = _uniform(4, images, generator).add(1).div(2)  # in [0, 1)
        tall, wide = self.erase * tall, self.erase * wide
        inside_rows = _inside(top * (1 - tall), tall, height)  # [N, H]
        inside_columns = _inside(left * (1 - wide), wide, width)  # [N, W]
        erased = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
        return images.masked_fill(erased, 0.0)


def _uniform(count: int, images: Tensor, generator: torch.Generator) -> Tensor:
    """[count, N], each in [-1, 1), on the images' device."""
    drawn = torch.rand(count, len(images), generator=generator, device=generator.device)
    return 2 * drawn.to(images.device) - 1


def _inside(start: Tensor, extent: Tensor, pixels: int) -> Tensor:
    """Pixel centres in [start, start + extent), both fractions of the edge: bool [N, pixels]."""
    centre = (torch.arange(pixels, device=start.device) + 0.5) / pixels
    return (centre >= start[:, None]) & (centre < (start + extent)[:, None])
