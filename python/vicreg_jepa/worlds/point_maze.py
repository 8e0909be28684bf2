"""The PointMaze environments of gymnasium-robotics: a ball that forces move through a maze.

The frame is drawn from the position and the map, without MuJoCo's renderer.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vicreg_jepa.worlds.adapter import Adapter, Raster, Task

GAIN, DAMPING = 4.0, 1.5  # of the controllers, by trial: the ball stops at the place it is led to

Cell = tuple[int, int]  # row, column


def point_maze(env: Any, size: int = 64, history: int = 1, repeat: int = 1) -> Adapter:
    """An adapter with a task. states: position and velocity. Controls: `straight` towards the goal,
    and `expert`, from cell to cell along the shortest path.
    """
    maze = env.unwrapped.maze
    walls = np.array([[cell == 1 for cell in row] for row in maze.maze_map])
    scale = float(maze.maze_size_scaling)
    half = scale * np.array(walls.shape[::-1]) / 2.0
    raster = Raster((-half).tolist(), half.tolist(), size, walls=walls)

    def states(observation: Any, info: dict[str, Any]) -> dict[str, Any]:
        return {
            "position": observation["observation"][:2],
            "velocity": observation["observation"][2:],
        }

    def towards(observation: Any, target: NDArray[Any]) -> NDArray[np.float32]:
        position, velocity = observation["observation"][:2], observation["observation"][2:]
        push = (GAIN * (target - position) - DAMPING * velocity) / scale
        return np.clip(push, -1, 1).astype(np.float32)

    def straight(observation: Any, info: dict[str, Any]) -> NDArray[np.float32]:
        return towards(observation, observation["desired_goal"])

    def cell_of(place: NDArray[Any]) -> Cell:
        return int((half[1] - place[1]) // scale), int((place[0] + half[0]) // scale)

    def expert(observation: Any, info: dict[str, Any]) -> NDArray[np.float32]:
        here, there = (cell_of(observation[name]) for name in ("achieved_goal", "desired_goal"))
        after = following(walls, there).get(here, there)
        if here == there:
            return straight(observation, info)
        row, column = after
        middle = np.array([(column + 0.5) * scale - half[0], half[1] - (row + 0.5) * scale])
        return towards(observation, middle)

    task = Task(
        goal=lambda observation, info: raster(observation["desired_goal"]),
        success=lambda observation, info: bool(info["success"]),
        controls={"straight": straight, "expert": expert},
    )
    drawn = lambda observation, info: raster(observation["achieved_goal"])  # noqa: E731
    return Adapter(env, drawn, states, task, history, repeat)


def following(walls: NDArray[np.bool_], goal: Cell) -> dict[Cell, Cell]:
    """The next cell on the shortest path to the goal, for each cell that is connected to it."""
    nexts, waiting = {}, deque([goal])
    while waiting:
        row, column = cell = waiting.popleft()
        for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            inside = 0 <= near[0] < walls.shape[0] and 0 <= near[1] < walls.shape[1]
            if inside and not walls[near] and near not in nexts and near != goal:
                nexts[near] = cell
                waiting.append(near)
    return nexts
