"""The learning rate and the weight decay of each step."""

from __future__ import annotations

import math

from vicreg_jepa.config import Optimizer


def cosine(start: float, final: float, part: float) -> float:
    return final + (start - final) * (1 + math.cos(math.pi * min(max(part, 0.0), 1.0))) / 2


def rate(settings: Optimizer, step: int, steps: int) -> float:
    """Linear rise to `rate` over the first `warmup` of the steps, then a cosine to `final_rate`."""
    rising = max(1, round(settings.warmup * steps))
    if step < rising:
        return settings.rate * (step + 1) / rising
    return cosine(settings.rate, settings.final_rate, (step - rising) / max(1, steps - rising))


def weight_decay(settings: Optimizer, step: int, steps: int) -> float:
    """A cosine from `weight_decay` to `final_weight_decay` (None: constant), as in I-JEPA."""
    if settings.final_weight_decay is None:
        return settings.weight_decay
    return cosine(settings.weight_decay, settings.final_weight_decay, step / max(1, steps))
