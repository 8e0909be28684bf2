"""Schemas of the dispatcher written from the NamedTuple that carries an op's settings."""

from __future__ import annotations

from typing import Any, get_type_hints

from torch import Tensor

_WORDS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    float: "float",
    int: "int",
    str: "str",
    str | None: "str?",
    list[float]: "float[]",
    list[int]: "int[]",
    tuple[float, float, float]: "float[]",
    tuple[int, int, int, int]: "int[]",
}


def arguments(settings: type[Any], **others: str) -> str:
    """The fields of a NamedTuple as arguments of an op, in their order.

    others: field -> the schema's type where Python's does not say it ("SymInt").
    """
    hints = get_type_hints(settings)
    assert others.keys() <= hints.keys(), others
    return ", ".join(
        f"{others.get(field) or _WORDS[hints[field]]} {field}" for field in settings._fields
    )
