"""The tables of a parity record: errors against float64, the worst over shapes. Needs no torch."""

from __future__ import annotations

from typing import Any

SCHEMA = "vicreg-kernels/parity/1"
SCALED = "float16, scaled"
# What a row of a table is called, beside the loss.
CONTENDERS = {"theirs": "theirs", "drop_in": "drop-in", "ours": "vk.VICRegLoss"}
# What the library calls an op that the record calls as it is published.
OPS = {"VICReg": "vicreg", "Barlow Twins": "barlow", "SIGReg": "sigreg"}
FIELDS = ("op", "name", "contender", "shape", "precision", "loss", "gradient")  # of every row
Row = dict[str, Any]


def _worst(rows: list[Row], what: str) -> float | str:
    """The largest error of a loss or a gradient, or that one is not finite."""
    kinds = {row[what] for row in rows}
    for kind in ("nan", "inf"):
        if kind in kinds:
            return "NaN" if kind == "nan" else "inf"
    return max(float(row[f"{what}_error"]) for row in rows)


def _settled(rows: list[Row]) -> float | str:
    """The least scale to which GradScaler comes down."""
    scales = [row["settled_scale"] for row in rows]
    return "none" if None in scales else min(scales)


def precisions(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["precision"] for row in rows))


def entries(run: dict[str, Any]) -> list[Row]:
    """Of each loss and contender the worst over shapes: op, name and whose, then by precision
    "<precision> loss" and "<precision> gradient", a number or "NaN" or "inf", and the scale.
    """
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in run["rows"]:
        found.setdefault((row["op"], row["name"], row["contender"]), []).append(row)
    made = []
    for (op, name, contender), mine in found.items():
        entry: Row = {"op": op, "name": name, "whose": CONTENDERS[contender]}
        for precision in precisions(mine):
            rows = [row for row in mine if row["precision"] == precision]
            entry |= {f"{precision} {what}": _worst(rows, what) for what in ("loss", "gradient")}
            if "settled_scale" in rows[0]:
                entry["scale"] = _settled(rows)
        made.append(entry)
    return made


def _shown(error: float | str) -> str:
    return error if isinstance(error, str) else f"{error:.0e}"


def lines_of(run: dict[str, Any], op: str) -> list[list[str]]:
    """A head, and for each loss of an op and each contender its cells."""
    columns = precisions([row for row in run["rows"] if row["op"] == op])
    lines = [[op, "whose", *columns, "scale"]]
    for entry in entries(run):
        if entry["op"] != op:
            continue
        cells = [entry["name"], entry["whose"]]
        for precision in columns:
            names = [f"{precision} {what}" for what in ("loss", "gradient")]
            measured = all(name in entry for name in names)
            cells.append(", ".join(_shown(entry[name]) for name in names) if measured else "-")
        scale = entry.get("scale", "")
        lines.append([*cells, scale if isinstance(scale, str) else f"{scale:.0f}"])
    return lines


def ops_of(run: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["op"] for row in run["rows"]))


def shapes(run: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(row["shape"] for row in run["rows"]))


def where(run: dict[str, Any]) -> str:
    versions = run["versions"]
    cuda = f", CUDA {versions['cuda']}" if run["device"]["type"] == "cuda" else ""
    peers = "".join(f", {name} {version}" for name, version in versions["peers"].items())
    commit = f", commit {run['commit']}" if run.get("commit") else ""
    made = f"{run['device']['name']}, {run['date'][:10]}{commit}"
    return f"{made}, torch {versions['torch']}{cuda}{peers}"


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
