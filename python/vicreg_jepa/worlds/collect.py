"""Writes trajectories of a world, or of any gymnasium environment, into a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vicreg_jepa.worlds import episodes, store
from vicreg_jepa.worlds.adapter import Adapter, Task
from vicreg_jepa.worlds.named import WORLDS, named
from vicreg_jepa.worlds.point_maze import point_maze
from vicreg_jepa.worlds.policies import BLIND, POLICIES


def collect(
    world: str,
    output: str | Path,
    count: int,
    length: int,
    seed: int,
    policy: str = "walk",
    settings: dict[str, Any] | None = None,
    done: Callable[[int], None] = lambda count: None,
    history: int = 1,
    repeat: int = 1,
) -> list[Path]:
    """Simulate and write `count` episodes of `length` actions; returns the paths of the shards.

    world: TwoRooms, Maze, or the name of a gymnasium environment whose observation is an image, or
    of a PointMaze. history, repeat: of gymnasium environments; see Adapter. Raises ValueError for
    bad arguments, before anything is written.
    """
    chosen = settings or {}
    for name, value in (("episodes", count), ("length", length)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, takes an integer from 1")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed: got {seed}, takes an integer from 0 to {2**31 - 1}")
    takes = POLICIES if world in WORLDS else BLIND
    if policy not in takes:
        raise ValueError(f"policy: got {policy!r}, {world} takes {', '.join(takes)}")
    made: Iterator[episodes.Episode]
    described: dict[str, Any] = {"world": world, "policy": policy, "seed": seed}
    if world in WORLDS:
        for name, value in (("history", history), ("repeat", repeat)):
            if value != 1:
                raise ValueError(f"{name}: got {value}, {world} takes 1")
        its = named(world, **chosen)
        chosen = its.settings()
        made = episodes.play(its, POLICIES[policy], seed, count, length)
    else:
        made = adapted(world, chosen, history, repeat).play(policy, seed, count, length)
        described |= {"history": history, "repeat": repeat}
    described["settings"] = chosen
    return store.write(output, made, described, done=done)


def adapted(name: str, settings: dict[str, Any], history: int, repeat: int) -> Adapter:
    """Make the adapter of a gymnasium environment whose observation is an image, or of a PointMaze.
    The task of the former is in its info: `goal` after a reset, the image at the goal, and
    `success` after each step.
    """
    env = _environment(name, settings)
    if "PointMaze" in name:
        return point_maze(env, history=history, repeat=repeat)
    return Adapter(env, task=TASK_OF_INFO, history=history, repeat=repeat)


def _said(info: dict[str, Any], name: str) -> Any:
    if name not in info:
        raise ValueError(
            f"info: got {list(info)}, takes {name!r} too: to be planned in, an environment says "
            "`goal`, the image at the goal, after a reset, and `success` after each step"
        )
    return info[name]


TASK_OF_INFO = Task(
    goal=lambda observation, info: _said(info, "goal"),
    success=lambda observation, info: bool(_said(info, "success")),
)


def _environment(name: str, settings: dict[str, Any]) -> Any:
    if "/" not in name and ":" not in name and "-v" not in name:
        raise ValueError(f"world: got {name!r}, takes {', '.join(WORLDS)} or gymnasium's name")
    from vicreg_jepa.worlds.environments import gymnasium

    try:
        return gymnasium.make(name, **settings)
    except (gymnasium.error.Error, TypeError, ImportError) as error:
        raise ValueError(f"world: {name!r} cannot be made ({error})") from error


def parsed(words: Sequence[str]) -> dict[str, Any]:
    """Parse words `key=value` with YAML values. Raises ValueError that names the key."""
    from vicreg_jepa.config import yaml_text

    settings: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ValueError(f"setting: got {word!r}, takes key=value")
        if key in settings:
            raise ValueError(f"{key}: given twice, takes one")
        try:
            settings[key] = yaml_text.parse(text)
        except yaml_text.YamlError as error:
            raise ValueError(f"{key}: got {text!r}, which {error}") from error
    return settings
