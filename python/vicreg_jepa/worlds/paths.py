"""The shortest path through a sequence of openings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import hypot

Point = tuple[float, float]
Portal = tuple[Point, Point]  # the left and the right end of an opening, in walking direction


def portal(axis: int, place: float, low: float, high: float, forward: bool) -> Portal:
    """The opening at a place on an axis (0: x, 1: y), from low to high on the other axis. It is
    crossed towards larger coordinates if `forward`.
    """
    lower, upper = ((place, low), (place, high)) if axis == 0 else ((low, place), (high, place))
    # In walking direction x, left is the direction y.
    return (lower, upper) if forward == (axis == 1) else (upper, lower)


def taut(start: Point, portals: Sequence[Portal], goal: Point) -> list[Point]:
    """The vertices of the shortest path from start to goal through the portals in this order,
    both ends included (the funnel algorithm of Lee and Preparata, Networks 14, 1984). The regions
    between the portals are convex.
    """
    gates = [(start, start), *portals, (goal, goal)]
    way = [start]
    apex = left = right = start
    left_gate = right_gate = number = 0
    while number + 1 < len(gates):
        number += 1
        new_left, new_right = gates[number]
        corner = None
        if _turn(apex, right, new_right) >= 0:  # the right side of the funnel moves inwards
            if apex == right or _turn(apex, left, new_right) < 0:
                right, right_gate = new_right, number
            else:  # it crosses the left side, whose end is then a vertex
                corner, number = left, left_gate
        if corner is None and _turn(apex, left, new_left) <= 0:
            if apex == left or _turn(apex, right, new_left) > 0:
                left, left_gate = new_left, number
            else:
                corner, number = right, right_gate
        if corner is not None:
            way.append(corner)
            apex = left = right = corner
            left_gate = right_gate = number
    return way if way[-1] == goal else [*way, goal]


def length(way: Sequence[Point]) -> float:
    return sum(hypot(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(way))


def _turn(a: Point, b: Point, c: Point) -> float:
    """Positive if c lies to the left of the line from a to b."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
