"""Random views of photographs: crop, flip, colour jitter, grayscale, blur and solarisation.

The defaults are those of VICReg (Bardes, Ponce and LeCun, 2022, appendix C), which are BYOL's
(Grill et al., 2020, arXiv:2006.07733, appendix B): the second view is blurred less often than the
first and is the only one that is solarised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ATTEMPTS = 10  # at a crop that lies inside of the image
RATIO = 4 / 3  # the largest ratio of a crop's edges, either way
SIGMA = (0.1, 2.0)  # of the blur, in pixels
BLURRED = 13  # the edge of the blur's kernel: three of the largest sigma on either side
LEAST_SIZE = BLURRED // 2 + 1  # of an image that can be padded by reflection for the blur


@dataclass(frozen=True)
class Natural:
    """crop: smallest and largest area, as fractions of the image's; jitter: the largest changes of
    brightness, contrast and saturation (relative) and of hue (of a whole turn), which an image gets
    in an order of its own; flip, jitter_probability, grayscale, blur, solarize: probabilities.

    All numbers are drawn here, for each image, from the generator that is passed; kornia only
    computes pixels from them and draws nothing.
    """

    crop: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    grayscale: float = 0.2
    blur: float = 1.0
    solarize: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """images: float32 [N, 3, S, S] in [0, 1], S >= 7 -> a view of the same shape, in [0, 1].

        The numbers are drawn on the generator's device: a CPU generator gives the same views on
        every device. Raises ImportError without kornia.
        """
        ops = kornia()
        # The products of bfloat16 would leave eight bits of a place or of a blurred pixel.
        with torch.autocast(images.device.type, enabled=False):
            images = self._crop(images, generator)
            images = self._jitter(images, generator, ops)
            images = self._grayscale(images, generator, ops)
            images = self._blur(images, generator, ops)
            return self._solarize(images, generator, ops)

    def boxes(self, images: int, generator: torch.Generator) -> Tensor:
        """float32 [4, N]: left, top, width and height of N random crops, as fractions of the edge.

        A box's area is uniform in `crop`, and the logarithm of its ratio of edges is uniform. The
        first of ten attempts that lies inside of the image is taken, or else the whole image.
        """
        area, ratio = _uniform((2, ATTEMPTS, images), generator)
        area = self.crop[0] + (self.crop[1] - self.crop[0]) * area
        ratio = torch.exp((2 * ratio - 1) * math.log(RATIO))
        edges = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt()))  # [2, ATTEMPTS, N]
        whole = torch.ones_like(edges[:, :1])
        edges = torch.cat((edges, whole), dim=1)
        first = (edges <= 1).all(dim=0).int().argmax(dim=0)  # [N]
        edges = edges.gather(1, first.expand(2, 1, -1)).squeeze(1)
        return torch.cat((_uniform((2, images), generator) * (1 - edges), edges))

    def _crop(self, images: Tensor, generator: torch.Generator) -> Tensor:
        left, top, width, height = self.boxes(len(images), generator).to(images.device)
        flipped = _chosen(self.flip, images, generator)
        # affine_grid's coordinates go from -1 to 1 over an edge.
        zero = torch.zeros_like(left)
        rows = (
            torch.stack((torch.where(flipped, -width, width), zero, 2 * left + width - 1), dim=-1),
            torch.stack((zero, height, 2 * top + height - 1), dim=-1),
        )
        theta = torch.stack(rows, dim=-2)  # [N, 2, 3]
        grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
        # A crop is never larger than the view, so nothing has to be smoothed before it is sampled.
        cropped = functional.grid_sample(
            images, grid, mode="bicubic", padding_mode="border", align_corners=False
        )
        return cropped.clamp(0.0, 1.0)

    def _jitter(self, images: Tensor, generator: torch.Generator, ops: Any) -> Tensor:
        count = len(images)
        chosen = _chosen(self.jitter_probability, images, generator)
        strength = torch.tensor(self.jitter, device=images.device)[:, None]
        change = strength * (2 * _uniform((4, count), generator).to(images.device) - 1)  # [4, N]
        orders = _uniform((4, count), generator).to(images.device).argsort(dim=0)
        if self.jitter_probability == 0 or not any(self.jitter):
            return images
        enhance = ops.enhance
        adjust = (
            lambda x, by: enhance.adjust_brightness_accumulative(x, 1 + by),
            lambda x, by: enhance.adjust.adjust_contrast_with_mean_subtraction(x, 1 + by),
            lambda x, by: enhance.adjust.adjust_saturation_with_gray_subtraction(x, 1 + by),
            lambda x, by: enhance.adjust_hue(x, 2 * math.pi * by),
        )
        images = images.clone()
        for turn in orders:  # [N]: which of the four changes each image gets now
            for number, changed in enumerate(adjust):
                (rows,) = torch.where(chosen & (turn == number))
                if len(rows):
                    images[rows] = changed(images[rows], change[number, rows])
        return images.clamp(0.0, 1.0)

    def _grayscale(self, images: Tensor, generator: torch.Generator, ops: Any) -> Tensor:
        chosen = _chosen(self.grayscale, images, generator)
        gray = ops.color.rgb_to_grayscale(images)
        return torch.where(chosen[:, None, None, None], gray, images)

    def _blur(self, images: Tensor, generator: torch.Generator, ops: Any) -> Tensor:
        chosen = _chosen(self.blur, images, generator)
        least, most = SIGMA
        sigma = least + (most - least) * _uniform((len(images), 1), generator).to(images.device)
        if self.blur == 0:
            return images
        kernel = (BLURRED, BLURRED)
        (rows,) = torch.where(chosen)
        if len(rows):
            blurred = ops.filters.gaussian_blur2d(images[rows], kernel, sigma[rows].expand(-1, 2))
            images = images.index_copy(0, rows, blurred.clamp(0.0, 1.0))
        return images

    def _solarize(self, images: Tensor, generator: torch.Generator, ops: Any) -> Tensor:
        """Invert the pixels from half of white on."""
        chosen = _chosen(self.solarize, images, generator)
        return torch.where(
            chosen[:, None, None, None], ops.enhance.solarize(images, thresholds=0.5), images
        )


def kornia() -> Any:
    """The package. Raises ImportError that says what to install."""
    try:
        import kornia as package
    except ImportError as error:
        raise ImportError(
            f"augment.name: 'natural' needs kornia: pip install kornia ({error})"
        ) from error
    return package


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Each in [0, 1), on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)


def _chosen(probability: float, images: Tensor, generator: torch.Generator) -> Tensor:
    """bool [N]: the images that are changed."""
    return _uniform((len(images),), generator).to(images.device) < probability
