"""Checks of SIGReg's arguments, before anything runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels.core import checks as shared
from vicreg_kernels.core import dispatch, reals
from vicreg_kernels.sigreg.conventions import CONVENTIONS, Convention, quadrature

MOST_KNOTS = 64
MOST = 1 << 63


class Checked(NamedTuple):
    """Checked settings: the convention, its slices, and the quadrature."""

    convention: Convention
    slices: int
    knots: list[float]
    weights: list[float]


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_settings(
    *,
    slices: int | None = None,
    knots: int | Sequence[float] | None = None,
    t_max: float | None = None,
    convention: str = "lejepa",
    seed: int = 0,
    backend: str | None = None,
) -> Checked:
    """The settings in full; raise a ValueError or TypeError that names the first that is wrong."""
    asked = (slices, knots, t_max, convention, seed, backend)
    if torch.compiler.is_compiling():
        return _check_settings(*asked)
    if isinstance(knots, (list, tuple)) and all(type(t) in (int, float) for t in knots):
        asked = (slices, tuple(knots), t_max, convention, seed, backend)
        knots = None
    plain = type(knots) in _PLAIN and type(t_max) in _PLAIN and type(slices) in _PLAIN
    if plain and type(seed) in _PLAIN and type(convention) is str and type(backend) in _PLAIN:
        return _kept_settings(*asked)
    return _check_settings(*asked)


# A setting of another type may change between calls, or have no hash.
_PLAIN = frozenset((int, float, str, bool, type(None)))


def _check_settings(
    slices: int | None,
    knots: int | Sequence[float] | None,
    t_max: float | None,
    convention: str,
    seed: int,
    backend: str | None,
) -> Checked:
    if convention not in tuple(CONVENTIONS):
        raise ValueError(f"convention: got {convention!r}, takes one of {tuple(CONVENTIONS)}")
    rule = CONVENTIONS[convention]
    if slices is None:
        slices = rule.slices
    if not is_int(slices):
        raise TypeError(f"slices: got {type(slices).__name__}, takes an int or None")
    if not 1 <= slices < MOST:
        raise ValueError(f"slices: got {slices}, takes at least 1 and less than 2^63")
    if not is_int(seed):
        raise TypeError(f"seed: got {type(seed).__name__}, takes an int")
    if not -MOST <= seed < MOST:
        raise ValueError(f"seed: got {seed}, takes a signed 64-bit int")
    positions, weights = quadrature(rule, *_check_knots(rule, knots, t_max))
    if len(positions) > MOST_KNOTS:
        raise ValueError(
            f"knots: got {len(positions)} distances from 0, takes at most {MOST_KNOTS}"
        )
    dispatch.check_backend(backend)
    return Checked(rule, slices, positions, weights)


# The quadrature takes longer than everything else that a call does in Python. typed: 1 is not True.
_kept_settings = lru_cache(maxsize=256, typed=True)(_check_settings)


def _check_knots(
    rule: Convention, knots: int | Sequence[float] | None, t_max: float | None
) -> tuple[int | Sequence[float], float]:
    if knots is None:
        knots = rule.knots
    if is_int(knots):
        if knots < 2:  # type: ignore[operator]
            raise ValueError(f"knots: got {knots}, takes at least 2")
        if knots > 4 * MOST_KNOTS:  # type: ignore[operator]
            raise ValueError(f"knots: got {knots}, takes at most {MOST_KNOTS} distances from 0")
        t_max = rule.t_max if t_max is None else reals.real("t_max", t_max, "a finite number > 0")
        if not 0 < t_max < math.inf:
            raise ValueError(f"t_max: got {t_max}, takes a finite number > 0")
        return knots, t_max
    if not isinstance(knots, (list, tuple)):
        raise TypeError(
            f"knots: got {type(knots).__name__}, takes an int, or a list or tuple of floats"
        )
    if t_max is not None:
        raise ValueError(f"t_max: got {t_max} with the knots themselves, takes None")
    knots = [reals.real("knots", t, "two or more ascending finite numbers") for t in knots]
    least = -math.inf if rule.symmetric else 0.0
    rising = all(a < b for a, b in itertools.pairwise(knots))
    if len(knots) < 2 or not rising or not least <= knots[0] or not all(map(math.isfinite, knots)):
        where = "" if rule.symmetric else " that are >= 0"
        raise ValueError(
            f"knots: got {list(knots)}, takes two or more ascending finite numbers{where}"
        )
    return knots, rule.t_max


def check_z(z: Tensor, least_rows: int) -> None:
    shared.is_tensor("z", z)
    shared.dense_float("z", z.dtype, z.layout)
    if z.dim() not in (2, 3):
        raise ValueError(f"z: got shape {tuple(z.shape)}, takes [N, D] or [G, N, D]")
    if z.shape[-2] < least_rows:
        raise ValueError(f"z: got {z.shape[-2]} rows, takes at least {least_rows}")
    if z.shape[-1] < 1 or z.shape[0] < 1:
        raise ValueError(f"z: got no elements (shape {tuple(z.shape)})")


def check_directions(directions: Tensor, z: Tensor, slices: int | None) -> None:
    shared.is_tensor("directions", directions)
    shared.dense_float("directions", directions.dtype, directions.layout, "dense")
    if directions.dim() != 2 or directions.shape[0] != z.shape[-1] or directions.shape[1] < 1:
        raise ValueError(
            f"directions: got shape {tuple(directions.shape)}, takes [D, M] with z's D = "
            f"{z.shape[-1]}"
        )
    if slices is not None and slices != directions.shape[1]:
        raise ValueError(
            f"slices: got {slices} with {directions.shape[1]} directions, takes that number or None"
        )
    shared.same_device("directions", directions.device, z.device, "z's device")
    if directions.requires_grad:
        raise ValueError(
            "directions: got a tensor that requires grad, takes constants: the loss is "
            "differentiated by z alone"
        )


def check_step(step: int | Tensor | None, device: torch.device) -> None:
    if step is None:
        return
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or step.dim() != 0:
            raise ValueError(
                f"step: got {step.dtype} of shape {tuple(step.shape)}, takes an int, or a 0-d "
                "int64 tensor"
            )
        shared.same_device("step", step.device, device, "z's device")
        return
    if not is_int(step):
        raise TypeError(
            f"step: got {type(step).__name__}, takes an int, a 0-d int64 tensor or None"
        )
    if not 0 <= step < MOST:
        raise ValueError(f"step: got {step}, takes 0 <= step < 2^63")


def check_call(
    z: Tensor,
    slices: int | None,
    knots: int | Sequence[float] | None,
    t_max: float | None,
    convention: str,
    directions: Tensor | None,
    step: int | Tensor | None,
    seed: int,
    group: str | None,
    backend: str | None,
) -> tuple[Checked, str]:
    """The settings, and the backend that runs."""
    settings = check_settings(
        slices=slices, knots=knots, t_max=t_max, convention=convention, seed=seed, backend=backend
    )
    check_z(z, least_rows=2 if group is None else 1)
    if directions is not None:
        check_directions(directions, z, slices)
    check_step(step, z.device)
    return settings, dispatch.choose("sigreg", backend, z.device.type, z.dtype)
