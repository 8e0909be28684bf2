"""Surprise without learning: the controls that a trained model must beat at a property.

Both predict the next frame from the last one or two, so an exchange that is hidden for longer
gives an exact tie, 50 %: their sums are of integers. What they tell apart in view is told apart by
smoothness alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_jepa.physics.scene import COLOURS

SATURATION = 0.35  # least of a pixel that is a thing's
LIKE = 0.95  # least cosine between the hue of a pixel and that of a thing's colour


def copy_last(videos: Tensor) -> dict[str, list[float]]:
    """The absolute change of the pixels of videos uint8 [N, F, H, W, 3] from each frame to the
    next: the error of copying the last frame.
    """
    change = (videos[:, 1:].int() - videos[:, :-1].int()).abs().sum(dim=(2, 3, 4))
    return _reduced(change)


def constant_velocity(videos: Tensor) -> dict[str, list[float]]:
    """The error of going on as between the last two frames, in what a tracker of colours measures:
    for each of the six colours the number of its pixels and the sums of their x and y. A thing that
    moves on as it moved changes these linearly.
    """
    measured = torch.stack([_moments(video) for video in videos])  # [N, F, 18]
    error = (measured[:, 2:] - 2 * measured[:, 1:-1] + measured[:, :-2]).abs().sum(dim=2)
    return _reduced(error)


def _moments(video: Tensor) -> Tensor:
    """int64 [F, colours * 3] of a video uint8 [F, H, W, 3]."""
    pixels = video.float()
    most, least = pixels.amax(dim=-1), pixels.amin(dim=-1)
    coloured = most - least > SATURATION * most.clamp_min(1)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    hues = torch.nn.functional.normalize(palette - palette.mean(dim=1, keepdim=True), dim=1)
    hue = torch.nn.functional.normalize(pixels - pixels.mean(dim=-1, keepdim=True), dim=-1)
    alike = (hue @ hues.T > LIKE) & coloured[..., None]  # [F, H, W, colours]
    height, width = video.shape[1:3]
    count = alike.long()
    x = count.sum(dim=1).mul(torch.arange(width)[:, None]).sum(dim=1)
    y = count.sum(dim=2).mul(torch.arange(height)[:, None]).sum(dim=1)
    return torch.cat((count.sum(dim=(1, 2)), x, y), dim=1)


def _reduced(errors: Tensor) -> dict[str, list[float]]:
    """The mean, times the number of frames so that it is exact, and the maximum of int64 errors
    [N, frames].
    """
    return {"mean": errors.sum(dim=1).tolist(), "maximum": errors.amax(dim=1).tolist()}


CONTROLS = {"copy": copy_last, "velocity": constant_velocity}
