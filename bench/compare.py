"""What changed between two sets of records beyond the noise of their repeats. Needs no torch.

A record holds each contender's p20, p50 and p80 over its rounds. Logarithms of times are taken as
normal: their standard deviation is the distance of the logs of p20 and p80 over what that distance
is on average in as many draws of the unit normal (Blom's approximation of order statistics), and
the standard error of a median is sqrt(pi / 2) of the mean's. The interval of the ratio of two
medians is Student's at 95 %, with the degrees of freedom of the shorter of the two.

It knows the noise within a run. A machine that is slower as a whole in one of the runs shows in the
contenders whose code did not change, so their median ratio is said too.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import flat

# Of Student's t, both sides, 95 %: by degrees of freedom from 1 to 24 (measure.MOST_ROUNDS - 1).
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064,
)  # fmt: skip
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Change:
    """new over old: the ratio of the medians and its interval; None where one was timed once."""

    op: str
    case: str
    dtype: str
    contender: str
    old_ms: float
    new_ms: float
    interval: tuple[float, float] | None

    @property
    def ratio(self) -> float:
        return self.new_ms / self.old_ms

    @property
    def verdict(self) -> str:
        """faster, slower, or within noise, which one round alone cannot tell apart."""
        if self.interval is None:
            return "one round, no interval"
        low, high = self.interval
        return "faster" if high < 1 else "slower" if low > 1 else "within noise"


def deviation(row: dict[str, Any]) -> float | None:
    """Of one sample's log, from p20 and p80 as `measure.Spread` picks them; None: one round."""
    rounds = row["rounds"]
    if rounds < 2:
        return None
    last = rounds - 1
    normal = statistics.NormalDist()
    low, high = (
        normal.inv_cdf((round(share * last) + 1 - 0.375) / (rounds + 0.25)) for share in (0.2, 0.8)
    )
    return math.log(row["p80_ms"] / row["p20_ms"]) / (high - low)


def change(old: dict[str, Any], new: dict[str, Any]) -> Change:
    """Of the same contender, case and dtype in two flat rows."""
    deviations = [deviation(row) for row in (old, new)]
    interval = None
    if None not in deviations:
        rounds = [row["rounds"] for row in (old, new)]
        variances = [d**2 / n for d, n in zip(deviations, rounds, strict=True) if d is not None]
        freedom = min(min(rounds) - 1, len(STUDENT))
        reach = STUDENT[freedom - 1] * math.sqrt(math.pi / 2 * sum(variances))
        ratio = new["p50_ms"] / old["p50_ms"]
        interval = ratio * math.exp(-reach), ratio * math.exp(reach)
    return Change(
        new["op"],
        new["case"],
        new["dtype"],
        new["contender"],
        old["p50_ms"],
        new["p50_ms"],
        interval,
    )


def last(folders: list[flat.Folder]) -> list[dict[str, Any]]:
    """Their flat rows; of several runs of a file the last."""
    return [row for row in flat.flattened(folders) if row["latest"]]


def load_old(path: Path) -> list[dict[str, Any]]:
    """The same of what is to be compared with. Raises ValueError as `flat.collect`, and where
    nothing in it was timed.
    """
    rows = last(flat.collect([path]))
    if not rows:
        raise ValueError(f"--compare: {path} holds no times")
    return rows


def by_key(rows: list[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    """Raises ValueError where two folders measured the same: which of them is meant?"""
    found: dict[Key, dict[str, Any]] = {}
    for row in rows:
        key = (row["op"], row["case"], row["dtype"], row["contender"])
        other = found.setdefault(key, row)
        if other["folder"] != row["folder"]:
            raise ValueError(
                f"{' '.join(key)} is in {other['folder']} and in {row['folder']}: name one folder"
            )
        found[key] = row
    return found


def _line(cells: list[str], width: int) -> str:
    case, *numbers, verdict = cells
    return f"{case:<{width}}" + "".join(f"{cell:>11}" for cell in numbers) + f"  {verdict}"


def told(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    """The comparison as text: a line for each contender of each case that both hold, and a summary.
    old, new: flat rows, one for each contender, case and dtype.
    """
    before, now = by_key(old), by_key(new)
    both = [key for key in now if key in before]
    if not both:
        return "nothing to compare: the two have no case, dtype and contender in common"
    lines = ["new over old: the ratio of the medians and its 95 % interval; below 1 is faster"]
    for name in ("device", "threads", "torch", "commit"):
        values = [
            ", ".join(sorted({str(rows[key][name]) for key in both})) for rows in (before, now)
        ]
        if values[0] != values[1]:
            lines.append(f"{name}: {values[0]} before, {values[1]} now")
    changes = [change(before[key], now[key]) for key in both]
    titles = [f"{c.op} {c.case} {c.dtype.replace('float', 'f')} {c.contender}" for c in changes]
    width = max(map(len, titles)) + 1
    lines += ["", _line(["", "old ms", "new ms", "ratio", "from", "to", ""], width).rstrip()]
    for title, each in zip(titles, changes, strict=True):
        ends = [f"{end:.3f}" for end in each.interval] if each.interval else ["-", "-"]
        numbers = [f"{each.old_ms:.4g}", f"{each.new_ms:.4g}", f"{each.ratio:.3f}", *ends]
        lines.append(_line([title, *numbers, each.verdict], width))
    lines.append("")
    for what, chosen in (
        ("ours", [c for c in changes if c.contender.startswith("ours")]),
        ("the others", [c for c in changes if not c.contender.startswith("ours")]),
    ):
        if chosen:
            verdicts = [c.verdict for c in chosen]
            counts = [f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts))]
            middle = statistics.median(c.ratio for c in chosen)
            lines.append(f"{what}: {', '.join(counts)}; median ratio {middle:.3f}")
    lines.append("None of our kernels runs in the others: what they changed by, the machine did.")
    for what, rows in (("before", before), ("now", now)):
        if len(rows) > len(both):
            lines.append(f"measured only {what}: {len(rows) - len(both)}")
    return "\n".join(lines)
