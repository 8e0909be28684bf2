"""Builds what draws each view of a method of views from the settings in `augment`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vicreg_jepa.methods.augment import Augment
from vicreg_jepa.methods.natural import LEAST_SIZE, Natural

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config

DrawView = Callable[[Tensor, torch.Generator], Tensor]
NATURAL = tuple(field.name for field in fields(Natural))
SETTINGS = ("augment.name", *(f"augment.{name}" for name in NATURAL))


def of(config: Config, views: int) -> tuple[DrawView, ...]:
    """One for each view; of the probabilities that differ, the first view has its own."""
    settings = config.augment
    if settings.name == "digits":
        return (Augment(),) * views
    shared = {name: getattr(settings, name) for name in NATURAL}
    first, others = (
        Natural(**{**shared, "blur": blur, "solarize": solarize})
        for blur, solarize in zip(settings.blur, settings.solarize, strict=True)
    )
    return (first, *(others,) * (views - 1))


def check(config: Config) -> None:
    """Raises ValueError that names the setting for data of which no view can be drawn."""
    if config.augment.name != "natural":
        return
    got, data = "augment.name: got 'natural'", config.data
    if data.kind == "digits":
        raise ValueError(f"{got}, takes images in colour, not data.kind 'digits'")
    if data.size < LEAST_SIZE:
        raise ValueError(
            f"data.size: got {data.size}, takes at least {LEAST_SIZE} with augment.name 'natural'"
        )
