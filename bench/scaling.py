"""How time grows with a case's sizes: exponents of log-log least squares. Needs no torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

# norm_8x16x196x384: what comes before the sizes, the sizes, and what comes after.
SIZES = re.compile(r"([a-z]+_)?(\d+(?:x\d+)+)((?:[-_].*)?)")
LEAST_POINTS = 2


@dataclass(frozen=True)
class Fit:
    """time = exp(intercept) * size^exponent through points.

    residual: the root of the mean of the squared distances of log time from the line; error: of
    the exponent, its standard error. Both are None for two points, through which the line goes.
    """

    exponent: float
    intercept: float
    residual: float | None
    error: float | None
    points: int


def fit(points: list[tuple[float, float]]) -> Fit:
    """Least squares through the logarithms of (size, time), at two or more different sizes."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    count = len(logs)
    mean_x, mean_y = (sum(values) / count for values in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread
    intercept = mean_y - exponent * mean_x
    if count == LEAST_POINTS:
        return Fit(exponent, intercept, None, None, count)
    squares = sum((y - intercept - exponent * x) ** 2 for x, y in logs)
    error = math.sqrt(squares / (count - 2) / spread)
    return Fit(exponent, intercept, math.sqrt(squares / count), error, count)


def axes(title: str) -> list[str]:
    """The names of a case's sizes, which a record's title ends with: "... by batch x slices"."""
    _, found, text = title.rpartition(" by ")
    return text.split(" x ") if found else []


def _families(rows: list[dict[str, Any]], title: str) -> dict[tuple[str, str], list[Any]]:
    """(size that varies, what is fixed) -> (size, row): cases that differ in that size alone."""
    names = axes(title)
    families: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        match = SIZES.fullmatch(row["case"])
        if match is None or match[2].count("x") + 1 != len(names):
            continue
        sizes = [int(size) for size in match[2].split("x")]
        for i, name in enumerate(names):
            others = [f"{n} {s}" for n, s in zip(names, sizes, strict=True) if n != name]
            what = [(match[1] or "").rstrip("_"), *others, match[3].lstrip("-_")]
            key = (name, ", ".join(filter(None, what)))
            families.setdefault(key, []).append((sizes[i], row))
    return families


def _by_work(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[Any]]:
    """All cases by what any implementation must do: bytes or operations, whichever takes longer in
    most of the cases.
    """
    bounds = Counter(row["bound"] for row in rows if row["bound"])
    if not bounds:
        return {}
    ((bound, _),) = bounds.most_common(1)
    rate = "gbps" if bound == "bytes" else "tflops"
    scale = 1e6 if bound == "bytes" else 1e9
    points = [(row[rate] * row["p50_ms"] * scale, row) for row in rows if row[rate]]
    return {(f"least {bound}", "all cases"): points}


def fits(rows: list[dict[str, Any]], titles: dict[str, str]) -> list[dict[str, Any]]:
    """Of the flat rows of `bench.flat`: one entry for each folder, op, dtype and contender, and for
    each size that takes two or more values while the others stay.

    titles: op -> the record's title. `points` are (size, milliseconds, case).
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["latest"]:
            key = tuple(row[name] for name in ("folder", "op", "dtype", "contender"))
            groups.setdefault(key, []).append(row)
    found = []
    for (folder, op, dtype, contender), members in groups.items():
        families = _families(members, titles[op]) | _by_work(members)
        for (axis, fixed), points in families.items():
            if len({size for size, _ in points}) < LEAST_POINTS:
                continue
            line = fit([(size, row["p50_ms"]) for size, row in points])
            entry: dict[str, Any] = {"folder": folder, "op": op, "dtype": dtype}
            entry |= {
                "contender": contender,
                "axis": axis,
                "fixed": fixed,
                **vars(line),
                "count": line.points,
            }
            listed = sorted((size, row["p50_ms"], row["case"]) for size, row in points)
            found.append(entry | {"points": listed})
    return found
