"""How each published SIGReg differs, and the knots and weights of its quadrature.

Every source compares, on random unit directions, the characteristic function of the projections
with the standard normal's, exp(-t^2 / 2), by

    sum_k w_k exp(-t_k^2 / 2) ((mean cos t_k p - exp(-t_k^2 / 2))^2 + (mean sin t_k p)^2)

with w the trapezoid rule over [-t_max, t_max], and averages over directions. The integrand is even,
so knots at t and -t are one knot of twice the weight; at t = 0 it vanishes. Most sources write the
half [0, t_max] with its inner weights doubled, which is the same sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Convention:
    """One source's settings.

    slices, knots, t_max: its defaults.
    symmetric: `knots` points lie on [-t_max, t_max], else on [0, t_max].
    times_rows: the statistic is multiplied by the number of rows of all ranks.
    pooled: the views of [V, N, D] are one sample of V N rows, else the mean over V is taken.
    """

    slices: int = 1024
    knots: int = 17
    t_max: float = 3.0
    symmetric: bool = False
    times_rows: bool = True
    pooled: bool = False


CONVENTIONS: dict[str, Convention] = {
    # rbalestr-lab/lejepa, univariate/epps_pulley.py
    "lejepa": Convention(),
    # facebookresearch/eb_jepa, losses.py
    "eb_jepa": Convention(slices=256, knots=10, symmetric=True, times_rows=False),
    # stable-worldmodel, wm/lewm: [T, B, D], a statistic per time step
    "lewm": Convention(),
    # lightly-ai/lightly, loss/lejepa_loss.py
    "lightly": Convention(),
    # rbalestr-lab/stable-pretraining, methods/lejepa.py
    "stable_pretraining": Convention(pooled=True),
}


def quadrature(
    convention: Convention, knots: int | Sequence[float], t_max: float
) -> tuple[list[float], list[float]]:
    """The positive knots in ascending order, and their weights with exp(-t^2 / 2) in them.

    knots: a number of equally spaced ones, or the knots (then t_max is not read).
    """
    if isinstance(knots, int):
        first = -t_max if convention.symmetric else 0.0
        step = (t_max - first) / (knots - 1)
        # Counted from the middle, so that t and -t have the same digits.
        middle = (knots - 1) / 2 if convention.symmetric else 0.0
        points = [(k - middle) * step for k in range(knots)]
    else:
        points = [float(t) for t in knots]
    last = len(points) - 1
    folded: dict[float, float] = {}
    for k, t in enumerate(points):
        width = points[min(k + 1, last)] - points[max(k - 1, 0)]
        weight = 0.5 * width if convention.symmetric else width
        if t != 0.0:
            folded[abs(t)] = folded.get(abs(t), 0.0) + weight * math.exp(-0.5 * t * t)
    positions = sorted(folded)
    return positions, [folded[t] for t in positions]
