"""Writes the tables of docs/results.md from the records. Needs no torch.

python3 -m bench.page

For each record that it shows the page has a line `<!-- bench/results/<device>/<op>.json -->` and a
line `<!-- end -->`; what is between them is written anew.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from bench import parity_table, report

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
SHOWN = re.compile(r"(<!-- (bench/results/[\w./-]+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


def cell(row: dict[str, Any] | None, times: str, ratio: str) -> str:
    """A contender's time as a multiple of ours, and how it stands to its target."""
    if row is None or not row.get(times):
        return ""
    if row[ratio] is None:
        return f"{row[times]['p50']:.3g} ms"
    text = report._multiple(row[ratio])
    if row["target"] is None:
        return text
    return f"{text} ✓" if row[ratio] >= row["target"] else f"{text} < {row['target']:g}"


def row_of(
    by_name: dict[str, dict[str, Any]], contenders: list[str], backends: bool, graph: bool
) -> list[str]:
    """Of one case and dtype; graph: of the replays of CUDA graphs, without the host's share."""
    times, ratio = ("graph_ms", "graph_ratio") if graph else ("ms", "ratio")
    case = next(iter(by_name.values()))["case"] + (", graph" if graph else "")
    mine = by_name.get("ours")
    own = ["", "", "", ""]
    if mine is not None:
        p50, mib = mine[times]["p50"], mine["peak_mib"]
        size = "" if mib is None else report._size(mib)
        own = [mine["backend"], f"{p50:.3g}", size, f"{100 * mine['floor_ms'] / p50:.0f}"]
    cells = [f"`{case}`", *own[0 if backends else 1 :]]
    return [*cells, *(cell(by_name.get(name), times, ratio) for name in contenders)]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def table(record: dict[str, Any], run: dict[str, Any], dtype: str) -> str:
    """The cases of one dtype, a column for each contender that it measured."""
    rows = [row for row in run["rows"] if row["dtype"] == dtype]
    measured = {row["contender"] for row in rows}
    contenders = [name for name in record["contenders"] if name in measured]
    backends = {row["backend"] for row in rows if row["contender"] == "ours"}
    head = ["case", *(["ours"] if len(backends) > 1 else []), "ms", "MiB", "% of floor"]
    head += [name.replace("_", " ") for name in contenders]
    lines = [line(head), line(["---", *["---:"] * (len(head) - 1)])]
    for case in dict.fromkeys(row["case"] for row in rows):
        by_name = {row["contender"]: row for row in rows if row["case"] == case}
        for graph in (False, True):
            if not graph or by_name.get("ours", {}).get("graph_ms"):
                lines.append(line(row_of(by_name, contenders, len(backends) > 1, graph)))
    return "\n".join(lines)


def errors(record: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """A run of a record of errors by precision: where it ran, a table for each op, what is not
    there.
    """
    where, shapes = parity_table.where(run), parity_table.shapes(run)
    parts = [f"{record['title']}, the largest over N x D of {shapes}; {where}."]
    for op in parity_table.ops_of(run):
        head, *lines = parity_table.lines_of(run, op)
        rule = ["---", "---", *["---:"] * (len(head) - 2)]
        parts.append("\n".join(map(line, [head, rule, *lines])))
    return [*parts, *(f"Left out: {remark}." for remark in parity_table.remarks(run))]


def section(record: dict[str, Any]) -> str:
    """All runs of a record: where they ran, and a table for each dtype."""
    if record["schema"] == parity_table.SCHEMA:
        return "\n\n".join(part for run in record["runs"] for part in errors(record, run))
    parts = []
    for run in record["runs"]:
        title, where = report.header(record, run).split("\n")[:2]
        parts.append(f"{title}; {where}.")
        for dtype in dict.fromkeys(row["dtype"] for row in run["rows"]):
            parts += [f"{report.ceilings_of(run, dtype)}:", table(record, run, dtype)]
    return "\n\n".join(parts)


def written(text: str) -> str:
    """The page with its tables written anew."""

    def replaced(match: re.Match[str]) -> str:
        (record,) = report.load([ROOT / match[2]])
        return f"{match[1]}\n{section(record)}\n\n{match[3]}"

    return SHOWN.sub(replaced, text)


def main() -> int:
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
