"""Margins for probes, by split conformal prediction (Vovk et al., 2005)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vicreg_jepa.planning import checks


def quantile(scores: Tensor, level: float) -> float:
    """The bound that a further score exceeds with a probability of at most 1 - level.

    scores: [n], of data that no fit has seen. The bound is the ceil((n + 1) * level)-th smallest
    one; it holds if the n scores and the further one are exchangeable. For a bound that holds over
    all steps of an episode, a score is the largest of an episode, and n the number of episodes.
    Raises ValueError if n is too small for the level, which takes n / (n + 1) at most.
    """
    checks.shaped("scores", scores, None)
    checks.number("level", level, most=1.0, open_low=True)
    if bool(torch.isnan(scores).any()):
        raise ValueError("scores: got NaN, takes numbers")
    count = len(scores)
    # Rounded, since 0.9 * (9 + 1) must be 9 in spite of binary fractions.
    rank = math.ceil(round((count + 1) * level, 9))
    if rank > count:
        raise ValueError(
            f"level: got {level} with {count} scores, takes at most {count}/{count + 1}; "
            f"{math.ceil(round(level / (1 - level), 9)) if level < 1 else 'no number of'} scores "
            "give this level"
        )
    return float(scores.double().sort().values[rank - 1])


def error(
    probe: Callable[[Tensor], Tensor], latents: Tensor, positions: Tensor, level: float
) -> float:
    """The margin of a probe that reads positions: the error along each axis, in pixels, that it
    exceeds in a further episode with a probability of at most 1 - level.

    latents: [E, T, D] and positions: [E, T, 2], of E held-out episodes of T steps. An episode
    counts as one score, its largest error. The shield takes the margin as its `error`.
    """
    checks.shaped("latents", latents, None, None, None)
    checks.shaped("positions", positions, *latents.shape[:2], 2)
    read = probe(latents.flatten(0, 1))
    checks.shaped("probe(latents)", read, latents.shape[0] * latents.shape[1], 2)
    errors = (read - positions.flatten(0, 1)).abs().amax(dim=1)
    return quantile(errors.view(positions.shape[:2]).amax(dim=1), level)
