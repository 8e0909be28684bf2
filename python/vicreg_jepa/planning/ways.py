"""The ways to plan with a model that `vicreg-jepa plan` compares: its own, and their controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vicreg_jepa.models.landmarks import Landmarks
from vicreg_jepa.planning.control import Plans
from vicreg_jepa.planning.energies import EnergyLike
from vicreg_jepa.planning.hierarchy.trained import counted_steps, has_levels, hierarchy, levels_of
from vicreg_jepa.planning.model import LatentModel
from vicreg_jepa.planning.planner import Planner

# The levels above a planner, from the lowest: (model, longest macro-action); and the landmarks.
Above = tuple[Sequence[tuple[LatentModel, int]], Landmarks]

FULL = ", full budget"
# The controls of a hierarchy: its lowest level's planner, the command's own, counted steps.
FLAT, LARGE, COUNTED = ", flat", ", flat, large", ", flat, counted steps"


@dataclass(frozen=True)
class Way:
    """kind: what follows the model's name in the table; "" for the model's own way. planner: what
    is asked for plans. energy: a function of the goal's latents, or None for the planner's own.
    control: whether it is a control of the model's own way.
    """

    kind: str
    planner: Plans
    energy: Callable[[Tensor], EnergyLike] | None = None
    control: bool = False

    def of(self, name: str) -> str | None:
        """The name of the row that this one is a control of."""
        return name if self.control else None


def ways(effort: Planner, low: Planner | None, above: Above | None, full: bool) -> list[Way]:
    """Without levels `effort`, a planner that has one; and if `full`, with its whole budget each
    time. With levels above `low` their hierarchy, after flat planning with `low`, with `effort` if
    `full`, and with `low` and the counted steps as its energy.

    Raises ValueError for levels without `low`.
    """
    if above is None:
        own = [Way("", effort)]
        return [*own, Way(FULL, replace(effort, effort=None))] if full else own
    if low is None:
        raise ValueError("low: got None, takes the planner of the lowest level")
    levels, landmarks = above
    flat = [Way(FLAT, low, control=True)]
    if full:
        flat.append(Way(LARGE, effort, control=True))
    flat.append(Way(COUNTED, low, counted_steps(landmarks), control=True))
    return [*flat, Way("", hierarchy(levels, landmarks, low))]


def above_of(method: Any) -> Above | None:
    """The levels and the landmarks of a trained method, or None for one without levels."""
    return (levels_of(method), method.landmarks()) if has_levels(method) else None
