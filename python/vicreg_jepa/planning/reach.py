"""The positions that a step of a world can reach, as boxes: bounds that hold for every outcome."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vicreg_jepa.worlds.world import SPEED, World

# Edges of walls of a world are at least so far apart along each axis, except from the outer wall,
# so an interval that is narrower holds at most one of them.
NARROWEST = 5.0
ROUNDING = 1e-4  # pixels: more than that of float32 in a position


@dataclass(frozen=True)
class Box:
    """The points p with low <= p <= high along each axis. low, high: [N, 2]."""

    low: Tensor
    high: Tensor

    def rows(self, which: Tensor) -> Box:
        return Box(self.low[which], self.high[which])

    def both(self, other: Box) -> Box:
        """The points that are in both."""
        return Box(torch.maximum(self.low, other.low), torch.minimum(self.high, other.high))


def around(position: Tensor, error: float) -> Box:
    """The positions within `error` pixels of a position along each axis."""
    if not error:
        return Box(position, position)
    return Box(position - error - ROUNDING, position + error + ROUNDING)


def pushes(action: Tensor, noise: float) -> Box:
    """The displacements of actions [N, 2] in [-1, 1], before contact with walls."""
    push = SPEED * action
    return Box(push - noise, push + noise)


def reached(world: World, layout: Tensor | None, box: Box, push: Box) -> Box:
    """A box that holds the position after a step from any valid position of `box`, with any
    displacement of `push`.

    From a single position it is the smallest such box: the contact with walls is followed along x,
    then along y, for the ends of the intervals. It is also followed from a box that is narrower
    than NARROWEST and whose corners are valid, for then each constant part of the walls' bounds
    holds a corner. From other boxes, and without a layout, the bound is that walls only shorten
    a displacement: x' lies between x and x + dx.
    """
    free = Box(
        box.low + push.low.clamp(max=0),
        box.high + push.high.clamp(min=0),
    )
    if layout is None:
        return free
    ends_x = (box.low[:, 0], box.high[:, 0])
    ends_y = (box.low[:, 1], box.high[:, 1])
    followed = torch.ones_like(ends_x[0], dtype=torch.bool)
    lows, highs = [], []
    for y in ends_y:
        sides = []
        for x, dx in zip(ends_x, (push.low[:, 0], push.high[:, 0]), strict=True):
            corner = torch.stack([x, y], dim=1)
            followed = followed & world.inside(corner, layout)
            sides.append((x + dx).clamp(*world.free(corner, layout, 0)))
        followed = followed & (sides[1] - sides[0] < NARROWEST)
        for x in sides:
            least, most = world.free(torch.stack([x, y], dim=1), layout, 1)
            lows.append(torch.stack([sides[0], (ends_y[0] + push.low[:, 1]).clamp(least, most)], 1))
            highs.append(
                torch.stack([sides[1], (ends_y[1] + push.high[:, 1]).clamp(least, most)], 1)
            )
    followed = followed & ((box.high - box.low) < NARROWEST).all(dim=1)
    low, high = torch.stack(lows).amin(dim=0), torch.stack(highs).amax(dim=0)
    each = followed[:, None]
    return Box(torch.where(each, low, free.low), torch.where(each, high, free.high))
