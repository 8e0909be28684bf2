"""The page of `bench.report --output`: all records in one HTML file that needs nothing else.

The file holds the flat rows of `bench.flat` and the fits of `bench.scaling` as JSON, and the CSS
and JavaScript of bench/assets, which draw the tables and figures. Needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import ALL, flat, parity_table, scaling

ASSETS = Path(__file__).resolve().parent / "assets"
# The loss that the library is called after comes first.
ORDER = ("vicreg", *(op for op in ALL if op != "vicreg"))
SCRIPTS = ("report_table.js", "report_charts.js", "report_page.js")


def _runs(folders: list[flat.Folder]) -> list[dict[str, Any]]:
    """One entry a run: where, with what and how, and the rates of the machine by dtype."""
    entries = []
    for folder in folders:
        for record, run in (
            (r, run) for r in (*folder.records, *folder.parity) for run in r["runs"]
        ):
            entry = flat.about(folder, run) | {"op": record["op"], "rows": len(run["rows"])}
            entry |= {name: run.get(name) for name in ("command", "seconds")}
            entry |= {
                name: run.get("host", {}).get(name) for name in ("processor", "cores", "system")
            }
            entry["python"] = run["versions"].get("python")
            entries.append(entry | {"ceilings": run.get("ceilings", {})})
    return entries


def _errors(folders: list[flat.Folder]) -> list[dict[str, Any]]:
    """The rows of the table of errors by precision, those of each run of such a record."""
    rows = []
    for folder in folders:
        for run in (run for record in folder.parity for run in record["runs"]):
            where = {"folder": folder.name, "commit": run.get("commit"), "date": run["date"]}
            where["shapes"] = parity_table.shapes(run)
            for entry in parity_table.entries(run):
                rows.append(where | entry | {"op": parity_table.OPS.get(entry["op"], entry["op"])})
    return rows


def _skipped(folders: list[flat.Folder]) -> list[dict[str, Any]]:
    """What was left out and why, of all records."""
    names = ("case", "dtype", "contender", "reason")
    found = []
    for folder in folders:
        for record, run in folder.runs():
            where = {"folder": folder.name, "op": record["op"]}
            found += [where | {name: skip[name] for name in names} for skip in run["skipped"]]
        for run in (run for record in folder.parity for run in record["runs"]):
            for skip in run["skipped"]:
                op = parity_table.OPS.get(skip.get("op", ""), "parity")
                what = (skip["name"], skip.get("precision"), skip["contender"], skip["why"])
                found.append(
                    {"folder": folder.name, "op": op} | dict(zip(names, what, strict=True))
                )
    return found


def _ops(folders: list[flat.Folder]) -> list[dict[str, Any]]:
    """Of each op its title and its contenders, in ORDER."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for record in folder.records:
            op = found.setdefault(
                record["op"], {"op": record["op"], "title": record["title"], "contenders": {}}
            )
            op["contenders"] |= record["contenders"]
    order = [*ORDER, *found]
    return sorted(found.values(), key=lambda op: order.index(op["op"]))


def data(folders: list[flat.Folder]) -> dict[str, Any]:
    """What the page draws; None where a record holds no figure."""
    ops = _ops(folders)
    rows = flat.flattened(folders)
    of_errors = [row for f in folders for r in f.parity for run in r["runs"] for row in run["rows"]]
    return {
        "fields": flat.FIELDS,
        "folders": [{"name": folder.name} for folder in folders],
        "everyOp": ORDER,
        "ops": ops,
        "runs": _runs(folders),
        "rows": rows,
        "skipped": _skipped(folders),
        "errors": _errors(folders),
        "precisions": parity_table.precisions(of_errors),
        "fits": scaling.fits(rows, {op["op"]: op["title"] for op in ops}),
    }


def page(folders: list[flat.Folder]) -> str:
    """The whole page."""
    # "<" as an escape of JSON: no text of a record ends the script that holds it
    held = json.dumps(data(folders), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "css": (ASSETS / "report.css").read_text(encoding="utf-8"),
        "js": "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "data": held,
    }
    text = (ASSETS / "report.html").read_text(encoding="utf-8")
    for name, content in parts.items():
        text = text.replace(f"{{{{{name}}}}}", content)
    return text


def write(folders: list[flat.Folder], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(folders), encoding="utf-8")
