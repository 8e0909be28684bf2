"""The hierarchy of a trained method, that of the true dynamics, and flat planning with counted
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from vicreg_jepa.models.landmarks import Landmarks
from vicreg_jepa.planning.energies import EnergyLike
from vicreg_jepa.planning.hierarchy.energies import Steps
from vicreg_jepa.planning.hierarchy.levels import Held
from vicreg_jepa.planning.hierarchy.planner import Hierarchy, Level
from vicreg_jepa.planning.model import LatentModel, TrueModel
from vicreg_jepa.planning.planner import Effort, Planner, check_horizon
from vicreg_jepa.planning.planners import ICEM

LOW: dict[str, Any] = {"horizon": 4, "candidates": 64, "elites": 8, "iterations": 4}
HIGH: dict[str, Any] = {
    "horizon": 6,
    "candidates": 64,
    "elites": 8,
    "iterations": 4,
    "deviation": 0.6,
}
TRUSTED = 1.5  # a level's longest chunks, as counted steps: the reach of the level below
HASTE = 0.2  # as to_goal's


def low_planner(settings: dict[str, Any]) -> Planner:
    """The planner of the lowest level: a subgoal is near, so a plan is short, and its horizon
    grows after every iteration. settings: override those of LOW; `every` is of flat planning alone.
    """
    chosen = {name: value for name, value in settings.items() if name != "every"}
    made = ICEM(**{**LOW, **chosen}, effort=Effort(horizon=1, growth=2.0, every=1))
    check_horizon(made, " of the lowest level")
    return made


def hierarchy(
    levels: Sequence[tuple[LatentModel, int]], landmarks: Landmarks, low: Planner
) -> Hierarchy:
    """The planner of levels above `low`, from the lowest: (model of macro-actions, the steps of its
    longest). Each level plans as often as the one below, for six of its macro-actions.
    """
    above = ICEM(repeat=1, interval=1, warm=False, **HIGH)
    made = tuple(Level(model, above, low.interval, TRUSTED * longest) for model, longest in levels)
    return Hierarchy(low, made, landmarks)


def levels_of(method: Any) -> list[tuple[LatentModel, int]]:
    """The levels of a trained method `hierarchy`, as `hierarchy` takes them."""
    return [(level, level.longest) for level in method.levels]


def true_levels(model: TrueModel, method: Any) -> list[tuple[LatentModel, int]]:
    """Levels as long as those of a trained method, whose macro-actions hold an action."""
    return [(Held(model, level.longest), level.longest) for level in method.levels]


def counted_steps(landmarks: Landmarks) -> Callable[[Tensor], EnergyLike]:
    """The energy of flat planning with counted steps: what the distance is worth without levels."""
    return lambda goal: Steps(landmarks, goal, "end") + HASTE * Steps(landmarks, goal, "sum")


def has_levels(method: nn.Module) -> bool:
    return hasattr(method, "levels") and hasattr(method, "landmarks")
