"""The records of folders as flat rows, for the CSV, the page and the comparison. Needs no torch."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import report

Row = dict[str, Any]

# The columns of the CSV.
WHERE = ("folder", "device", "device_type", "threads", "torch", "cuda", "triton", "vicreg_kernels")
FIELDS = (
    *WHERE, "commit", "date", "op", "case", "dtype", "contender", "backend", "rounds", "p20_ms",
    "p50_ms", "p80_ms", "ratio", "target", "most_ms", "graph_p50_ms", "graph_ratio", "peak_mib",
    "gbps", "tflops", "bound", "floor_ms", "percent_of_floor", "launches", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """The records of one folder, or of one file; name: what sets it apart from the others.
    parity: those of errors by precision, which hold no times.
    """

    name: str
    path: Path
    records: list[dict[str, Any]]
    parity: list[dict[str, Any]] = field(default_factory=list)

    def runs(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each run, with its record."""
        for record in self.records:
            for run in record["runs"]:
                yield record, run


def collect(paths: list[Path]) -> list[Folder]:
    """Every folder of or below the paths that holds records. Raises ValueError as `report.read`,
    and where two files of a folder are of one op.
    """
    found: dict[Path, None] = {}
    for path in paths:
        files = sorted(path.rglob("*.json")) if path.is_dir() else []
        for place in [file.parent for file in files] or ([path] if path.is_file() else []):
            found.setdefault(place)
    names = _names([place.resolve() for place in found])
    folders = []
    for name, place in zip(names, found, strict=True):
        records = _read(sorted(place.glob("*.json")) if place.is_dir() else [place])
        times, parity = report.apart(records)
        folders.append(Folder(name, place, times, parity))
    return folders


def _read(files: list[Path]) -> list[dict[str, Any]]:
    """Their records in the order of the ops, one of each."""
    found: dict[str, Path] = {}
    records = []
    for file in files:
        record = report.read(file)
        other = found.setdefault(record["op"], file)
        if other != file:
            raise ValueError(f"{other} and {file} are both of {record['op']}: a folder takes one")
        records.append(record)
    return report.in_order(records)


def _names(places: list[Path]) -> list[str]:
    """As many of the last parts of each path as tell it from the others."""
    names = []
    for place in places:
        parts = place.parts
        count = 1
        while count < len(parts) and sum(p.parts[-count:] == parts[-count:] for p in places) > 1:
            count += 1
        names.append("/".join(parts[-count:]))
    return names


def _counted(value: float | None) -> float | None:
    """None in the place of 0: a case that does not count its least bytes or operations has it."""
    return value or None


def about(folder: Folder, run: dict[str, Any]) -> Row:
    """Where and with what a run was made."""
    versions, device = run["versions"], run["device"]
    row = {"folder": folder.name, "device": device["name"], "device_type": device["type"]}
    row |= {"threads": run["threads"], "commit": run.get("commit"), "date": run["date"]}
    names = ("torch", "cuda", "triton", "vicreg_kernels")
    return row | {name: versions.get(name) for name in names}


def flattened(folders: list[Folder]) -> list[Row]:
    """One row a measurement, in the order of the records: FIELDS, and `shares`, `latest`. What a
    record does not hold is None.

    shares: of a step's time, by op, where it was recorded. latest: whether no later run of the same
    file measured the same contender on the same case and dtype.
    """
    rows: list[Row] = []
    last: dict[tuple[str, ...], Row] = {}
    for folder in folders:
        for record, run in folder.runs():
            where = about(folder, run)
            for found in run["rows"]:
                ms, graph = found["ms"], found.get("graph_ms") or {}
                floor = _counted(found["floor_ms"])
                row = dict.fromkeys(FIELDS) | where | {"op": record["op"], "latest": True}
                row |= {name: found[name] for name in FIELDS if name in found}
                row |= {f"{name}_ms": ms[name] for name in ("p20", "p50", "p80")}
                row |= {"graph_p50_ms": graph.get("p50"), "shares": found.get("shares")}
                row |= {name: _counted(found.get(name)) for name in ("gbps", "tflops")}
                row |= {"floor_ms": floor, "bound": found.get("bound") if floor else None}
                row["percent_of_floor"] = floor and 100 * floor / ms["p50"]
                key = (folder.name, record["op"], *(found[name] for name in report.KEY))
                if key in last:
                    last[key]["latest"] = False
                last[key] = row
                rows.append(row)
    return rows


def write_csv(rows: list[Row], path: Path) -> None:
    """A heading and one line a row; an empty cell where a figure is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
