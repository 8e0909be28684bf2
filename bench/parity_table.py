"""The tables of a parity record: errors against float64, the worst over shapes. Needs no torch."""

from __future__ import annotations

from typing import Any

SCHEMA = "vicreg-kernels/parity/1"
SCALED = "float16, scaled"
# What a row of a table is called, beside the loss.
CONTENDERS = {"theirs": "theirs", "drop_in": "drop-in", "ours": "vk.VICRegLoss"}
FIELDS = ("op", "name", "contender", "shape", "precision", "loss", "gradient")  # of every row
Row = dict[str, Any]


def _part(rows: list[Row], what: str) -> str:
    """The largest error of a loss or a gradient, or that one is not finite."""
    kinds = {row[what] for row in rows}
    for kind in ("nan", "inf"):
        if kind in kinds:
            return "NaN" if kind == "nan" else "inf"
    return f"{max(row[f'{what}_error'] for row in rows):.0e}"


def _settled(rows: list[Row]) -> str:
    """The least scale to which GradScaler comes down."""
    scales = [row["settled_scale"] for row in rows]
    return "none" if None in scales else f"{min(scales):.0f}"


def lines_of(run: dict[str, Any], op: str) -> list[list[str]]:
    """A head, and for each loss of an op and each contender its cells."""
    mine = [row for row in run["rows"] if row["op"] == op]
    precisions = list(dict.fromkeys(row["precision"] for row in mine))
    lines = [[op, "whose", *precisions, "scale"]]
    for name, contender in dict.fromkeys((row["name"], row["contender"]) for row in mine):
        cells, scale = [], ""
        for precision in precisions:
            key = {"name": name, "contender": contender, "precision": precision}
            rows = [row for row in mine if key.items() <= row.items()]
            cells.append(f"{_part(rows, 'loss')}, {_part(rows, 'gradient')}" if rows else "-")
            if rows and "settled_scale" in rows[0]:
                scale = _settled(rows)
        lines.append([name, CONTENDERS[contender], *cells, scale])
    return lines


def ops_of(run: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["op"] for row in run["rows"]))


def shapes(run: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(row["shape"] for row in run["rows"]))


def where(run: dict[str, Any]) -> str:
    versions = run["versions"]
    cuda = f", CUDA {versions['cuda']}" if run["device"]["type"] == "cuda" else ""
    peers = "".join(f", {name} {version}" for name, version in versions["peers"].items())
    return f"{run['device']['name']}, {run['date'][:10]}, torch {versions['torch']}{cuda}{peers}"


def remarks(run: dict[str, Any]) -> list[str]:
    """What there is no row of, and why."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for skip in run["skipped"]:
        key = (skip["name"], CONTENDERS[skip["contender"]], skip["why"])
        places = reasons.setdefault(key, [])
        if "precision" in skip and skip["precision"] not in places:
            places.append(skip["precision"])
    return [
        f"{name} ({whose}){' in ' + ', '.join(places) if places else ''}: {why}"
        for (name, whose, why), places in reasons.items()
    ]


def text(record: dict[str, Any], run: dict[str, Any]) -> str:
    """One run, for a terminal."""
    parts = [f"{record['title']}\n{where(run)}"]
    parts[0] += f"\nloss, gradient: the largest relative error over N x D of {shapes(run)}"
    for op in ops_of(run):
        lines = lines_of(run, op)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
        parts.append("\n".join(line.rstrip() for line in shown))
    left = [f"left out: {remark}" for remark in remarks(run)]
    return "\n\n".join([*parts, *(["\n".join(left)] if left else [])])
