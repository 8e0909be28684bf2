"""The registry of worlds by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vicreg_jepa.worlds.maze import Maze
from vicreg_jepa.worlds.two_rooms import TwoRooms
from vicreg_jepa.worlds.window import MazeWindow
from vicreg_jepa.worlds.world import World

WORLDS: dict[str, type[World]] = {
    "TwoRooms": TwoRooms,
    "Maze": Maze,
    "MazeWindow": MazeWindow,
}


def named(name: str, **settings: Any) -> World:
    """Create a world. Raises ValueError for an unknown name or setting, or a bad value."""
    if name not in WORLDS:
        raise ValueError(f"world: got {name!r}, takes {' or '.join(WORLDS)}")
    takes = [field.name for field in fields(WORLDS[name])]
    for setting in settings:
        if setting not in takes:
            raise ValueError(f"{setting}: is no setting of {name}, which takes {', '.join(takes)}")
    return WORLDS[name](**settings)
