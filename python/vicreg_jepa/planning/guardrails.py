"""Constraints on what is executed. They are no part of an energy: no weight can outbid them.

A constraint gives the signed clearance [N] of a transition: negative means that it may be violated.
The clearance is a lower bound over all positions of boxes. Lengths are in pixels; positions are
of the dot's centre, so a margin of RADIUS keeps the whole dot out of a zone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vicreg_jepa.planning import checks
from vicreg_jepa.planning.reach import Box
from vicreg_jepa.worlds.world import SPEED


class Constraint(ABC):
    """The base class of constraints."""

    @abstractmethod
    def of(self, box: Box) -> Tensor:
        """Return [N]: a lower bound of the clearance over all positions of boxes."""

    def during(self, box: Box, push: Box) -> Tensor:
        """Return [N]: the same for a step that ends in `box` and moves by at most `push`."""
        return self.of(box)

    def at(self, position: Tensor) -> Tensor:
        """Return [N]: the clearance of positions [N, 2]."""
        return self.of(Box(position, position))

    def rows(self, which: Tensor) -> Constraint:
        """Return the constraint of the environments `which`, int64 [M]."""
        return self

    def lean(self, box: Box) -> Tensor | None:
        """Return directions [N, 2] in {-1, 0, 1} along which no displacement lowers the clearance
        of a box, for any walls, or None if no such directions are known.
        """
        return None


@dataclass(frozen=True)
class Zone(Constraint):
    """A zone to keep out of: a disc or a rectangle with its sides along the axes.

    centre: [N, 2], or [2] for all environments. radius: [N] or a number, of a disc; half: as
    centre, half the width and height of a rectangle. Give one of the two. margin: the least
    distance.
    """

    centre: Tensor
    radius: Tensor | float | None = None
    half: Tensor | None = None
    margin: float = 0.0

    def __post_init__(self) -> None:
        if (self.radius is None) == (self.half is None):
            raise ValueError("radius, half: got both or none, takes one of them")
        for name in ("centre", "half"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, Tensor) or value.shape[-1:] != (2,) or value.dim() > 2:
                    raise ValueError(f"{name}: got {value!r}, takes a tensor [N, 2] or [2]")
                checks.finite(name, value)
        size = self.half if self.half is not None else torch.as_tensor(self.radius)
        name = "half" if self.half is not None else "radius"
        if not bool((torch.isfinite(size) & (size >= 0)).all()):
            raise ValueError(f"{name}: got {size.tolist()}, takes finite numbers of 0 or more")
        checks.number("margin", self.margin)

    def rows(self, which: Tensor) -> Zone:
        def some(value: Tensor, dims: int) -> Tensor:
            return value[which] if value.dim() == dims else value

        radius = self.radius if not isinstance(self.radius, Tensor) else some(self.radius, 1)
        half = None if self.half is None else some(self.half, 2)
        return Zone(some(self.centre, 2), radius, half, self.margin)

    def _gaps(self, box: Box) -> Tensor:
        """[N, 2]: the distance from the centre to the box along each axis."""
        _fits("centre", self.centre, 2, box)
        _fits("half", self.half, 2, box)
        _fits("radius", self.radius, 1, box)
        return torch.maximum(box.low - self.centre, self.centre - box.high).clamp(min=0)

    def of(self, box: Box) -> Tensor:
        gaps = self._gaps(box)
        if self.half is None:
            return torch.linalg.vector_norm(gaps, dim=1) - self.radius - self.margin
        outside = gaps - self.half
        distance = torch.linalg.vector_norm(outside.clamp(min=0), dim=1)
        return distance + outside.amax(dim=1).clamp(max=0) - self.margin

    def lean(self, box: Box) -> Tensor:
        """Away from the centre along each axis on which the box does not lie across it."""
        return (box.low > self.centre).to(box.low) - (box.high < self.centre).to(box.low)


@dataclass(frozen=True)
class Distance(Constraint):
    """Stay within `most` pixels of a place, [N, 2] or [2]."""

    place: Tensor
    most: float

    def __post_init__(self) -> None:
        checks.number("most", self.most, open_low=True)
        if not isinstance(self.place, Tensor) or self.place.shape[-1:] != (2,):
            raise ValueError(f"place: got {self.place!r}, takes a tensor [N, 2] or [2]")
        checks.finite("place", self.place)

    def rows(self, which: Tensor) -> Distance:
        place = self.place[which] if self.place.dim() == 2 else self.place
        return Distance(place, self.most)

    def of(self, box: Box) -> Tensor:
        _fits("place", self.place, 2, box)
        far = torch.maximum(box.high - self.place, self.place - box.low)
        return self.most - torch.linalg.vector_norm(far, dim=1)


@dataclass(frozen=True)
class Speed(Constraint):
    """Move by at most `most` pixels in a step, noise included. Contact with walls only shortens a
    displacement, so the bound is that of the displacement before it.
    """

    most: float

    def __post_init__(self) -> None:
        checks.number("most", self.most, open_low=True)

    def of(self, box: Box) -> Tensor:
        return torch.full_like(box.low[:, 0], self.most)

    def during(self, box: Box, push: Box) -> Tensor:
        return self.most - torch.linalg.vector_norm(
            torch.maximum(push.high.abs(), push.low.abs()), dim=1
        )


@dataclass(frozen=True)
class Clearance(Constraint):
    """Any signed clearance: a function of positions [N, 2] that returns [N].

    slope: a bound of its change per pixel (its Lipschitz constant); a distance has 1. The bound
    over a box is the clearance of its middle, less slope times half its diagonal.
    """

    function: Callable[[Tensor], Tensor]
    slope: float = 1.0

    def __post_init__(self) -> None:
        checks.number("slope", self.slope)
        if not callable(self.function):
            raise ValueError(f"function: got {self.function!r}, takes a callable of positions")

    def of(self, box: Box) -> Tensor:
        value = self.function((box.low + box.high) / 2)
        if not isinstance(value, Tensor) or value.shape != box.low.shape[:1]:
            raise ValueError(f"function: got {value!r}, takes a function that returns [N]")
        value = value - self.slope * torch.linalg.vector_norm((box.high - box.low) / 2, dim=1)
        return torch.where(torch.isnan(value), -torch.inf, value)


def _fits(name: str, value: Tensor | float | None, dims: int, box: Box) -> None:
    """A tensor of `dims` dimensions has a row for each of the environments."""
    count = len(box.low)
    if isinstance(value, Tensor) and value.dim() == dims and len(value) != count:
        raise ValueError(f"{name}: got {len(value)} rows, takes one for each of {count}")


def against(lean: Tensor, noise: float) -> Tensor:
    """The smallest actions whose displacement is in the directions `lean`, or 0, for any noise."""
    return lean * (noise / SPEED)
