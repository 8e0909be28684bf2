"""Writes trajectories of a world, or of any gymnasium environment, into a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vicreg_jepa.worlds import episodes, store
from vicreg_jepa.worlds.adapter import Adapter
from vicreg_jepa.worlds.named import WORLDS, named
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
) -> list[Path]:
    """Simulate and write `count` episodes of `length` actions; returns the paths of the shards.

    world: TwoRooms, Maze, or the name of a gymnasium environment whose observation is an image.
    Raises ValueError for bad arguments, before anything is written.
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
    if world in WORLDS:
        its = named(world, **chosen)
        chosen = its.settings()
        made = episodes.play(its, POLICIES[policy], seed, count, length)
    else:
        made = Adapter(_environment(world, chosen)).play(policy, seed, count, length)
    described = {"world": world, "settings": chosen, "policy": policy, "seed": seed}
    return store.write(output, made, described, done=done)


def _environment(name: str, settings: dict[str, Any]) -> Any:
    if "/" not in name and ":" not in name and "-v" not in name:
        raise ValueError(f"world: got {name!r}, takes {', '.join(WORLDS)} or gymnasium's name")
    from vicreg_jepa.worlds.environments import gymnasium

    try:
        return gymnasium.make(name, **settings)
    except (gymnasium.error.Error, TypeError, ImportError) as error:
        raise ValueError(f"world: {name!r} cannot be made ({error})") from error


def parsed(words: Sequence[str]) -> dict[str, Any]:
    """Settings from words `key=value` with YAML values. Raises ValueError that names the key."""
    from vicreg_jepa.config import yaml_text

    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ValueError(f"setting: got {word!r}, takes key=value")
        if key in found:
            raise ValueError(f"{key}: given twice, takes one")
        try:
            found[key] = yaml_text.parse(text)
        except yaml_text.YamlError as error:
            raise ValueError(f"{key}: got {text!r}, which {error}") from error
    return found
