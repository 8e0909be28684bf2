"""Forbidden zones that matter: discs on the way to the goal, at the goal, beside the start."""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_jepa.planning.guardrails import Zone
from vicreg_jepa.worlds import draws
from vicreg_jepa.worlds.draws import Stream
from vicreg_jepa.worlds.world import REACHED, State, World

LEAST, MOST = 2.0, 6.0  # of a radius
APART = REACHED + 1.0  # from the edge of a zone to the start, the goal and the openings
NEAR = 1.0
TRIES = 64
OUTSIDE = (-100.0, -100.0)  # the place of a zone for which there is no room


def on_the_way(world: World, state: State) -> Zone:
    """A disc for each environment, with its centre near the shortest path to the goal.

    Each depends only on the episode's seed. No disc is nearer than APART to the start, the goal or
    the middle of an opening on the way. Where none of TRIES draws fits, the disc lies outside of
    the picture.
    """
    u = draws.uniform(state.seed, Stream.ZONE, 0, 4 * TRIES).view(-1, TRIES, 4)
    radius = draws.between(u[..., 0], LEAST, MOST)
    centres, radii = [], []
    for number, (way, portals) in enumerate(
        zip(world.way(state), world.portals(state), strict=True)
    ):
        middles = [_middle(portal) for portal in portals]
        apart = torch.tensor([way[0], way[-1], *middles], dtype=torch.float32)
        line = torch.tensor(way, dtype=torch.float32)
        centre = _along(line, u[number, :, 1]) + 4 * u[number, :, 2:] - 2
        distance = torch.cdist(centre, apart).amin(dim=1)
        fits = (distance >= radius[number] + APART).nonzero()[:, 0]
        centres.append(centre[fits[0]] if len(fits) else torch.tensor(OUTSIDE))
        radii.append(radius[number, fits[0]] if len(fits) else radius.new_zeros(()))
    return Zone(torch.stack(centres).to(state.position), torch.stack(radii).to(state.position))


def at_the_goal(world: World, state: State) -> Zone:
    """A disc around each goal that leaves the start outside."""
    room = world.from_goal(state) - APART
    return Zone(state.goal, room.clamp(LEAST, MOST))


def beside_the_start(world: World, state: State) -> Zone:
    """A disc for each environment, whose edge is NEAR pixels from the start, in a direction that
    depends on the episode's seed.
    """
    angle = 2 * torch.pi * draws.uniform(state.seed, Stream.ZONE, 0, 1)
    direction = torch.cat([angle.cos(), angle.sin()], dim=1)
    return Zone(state.position + (MOST + NEAR) * direction, MOST)


def _middle(portal: tuple[tuple[float, float], tuple[float, float]]) -> tuple[float, float]:
    (x, y), (other_x, other_y) = portal
    return (x + other_x) / 2, (y + other_y) / 2


def _along(line: Tensor, share: Tensor) -> Tensor:
    """[M, 2]: points at shares [M] of the length of a polyline [V, 2]."""
    parts = line[1:] - line[:-1]
    lengths = torch.linalg.vector_norm(parts, dim=1).clamp(min=1e-6)
    ends = lengths.cumsum(dim=0)
    place = share * ends[-1]
    which = torch.searchsorted(ends, place).clamp(max=len(parts) - 1)
    rest = (place - (ends - lengths)[which]) / lengths[which]
    return line[:-1][which] + rest[:, None] * parts[which]
