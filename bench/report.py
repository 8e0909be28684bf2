"""Tables, the page and the figure of bench/results: medians, ratios, targets. Needs no torch.

python3 -m bench.report [FILE_OR_FOLDER ...]
python3 -m bench.report [FILE_OR_FOLDER ...] --output report.html --csv report.csv
python3 -m bench.report NEW --compare OLD
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import OPS, parity_table

SCHEMA = "vicreg-kernels/bench/3"
# The runs of 2 lack `planned`, and measured all contenders of a case in one group.
READABLE = (SCHEMA, "vicreg-kernels/bench/2", parity_table.SCHEMA)
RESULTS = Path(__file__).resolve().parent / "results"
LEGEND = """\
Of ours: p50, peak memory beyond its inputs, percent of the floor. Of the others: their time as a
multiple of ours (median of interleaved rounds; * target met, ! missed); those called ours_ are ours
on another backend than the one that it chooses."""


def judge(row: dict[str, Any], key: str = "ratio") -> str:
    """ "*" where a contender's ratio reaches its target, "!" where not, " " where it has none."""
    if row["target"] is None or row[key] is None:
        return " "
    return "*" if row[key] >= row["target"] else "!"


def _multiple(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _size(mib: float | None) -> str:
    """None: not counted."""
    if mib is None:
        return "-"
    return f"{mib:.1f}" if mib < 1000 else f"{mib:.0f}"


def _cell(row: dict[str, Any], times: str, ratio: str) -> str:
    if not row.get(times):
        return "- "
    if row[ratio] is None:
        return f"{row[times]['p50']:.3g} ms"
    return f"{_multiple(row[ratio])}x{judge(row, ratio)}"


@dataclass(frozen=True)
class Columns:
    """The layout of a table: the widest case name, and the contenders, a column each."""

    width: int
    contenders: list[str]

    def _row(self, cells: list[str]) -> str:
        case, dtype, backend, *numbers = cells
        # A heading stands on two lines, broken at its underscore.
        widths = [8, 8, 8]
        widths += [max(8, *(len(part) + 2 for part in n.split("_", 1))) for n in self.contenders]
        text = f"{case:<{max(self.width, 4)}} {dtype:<6}{backend:<10}"
        text += "".join(f"{n:>{w}}" for n, w in zip(numbers, widths, strict=True))
        return text.rstrip()

    def headings(self) -> str:
        parts = [(*name.split("_", 1), "")[:2] for name in self.contenders]
        upper = ["case", "dtype", "ours", "ms", "MiB", "floor%", *(f"{a} " for a, _ in parts)]
        lower = [""] * 6 + [f"{b} " for _, b in parts]
        return "\n".join(filter(None, (self._row(upper), self._row(lower))))

    def _line(self, by_name: dict[str, dict[str, Any]], graph: bool) -> str:
        """Of one case and dtype; graph: of the replays of CUDA graphs, without the host's share."""
        times, ratio = ("graph_ms", "graph_ratio") if graph else ("ms", "ratio")
        row = next(iter(by_name.values()))
        cells = [row["case"], row["dtype"].replace("float", "f")]
        mine = by_name.get("ours")
        if mine is None:
            cells += ["-"] * 4
        else:
            p50 = mine[times]["p50"]
            floor = f"{100 * mine['floor_ms'] / p50:.0f}"
            backend = "  as graph" if graph else mine["backend"]
            cells += [backend, f"{p50:.3g}", _size(mine["peak_mib"]), floor]
        return self._row(
            [*cells, *(_cell(by_name.get(n, {}), times, ratio) for n in self.contenders)]
        )

    def lines_of(self, rows: list[dict[str, Any]]) -> str:
        """One line a case and dtype, ours first, then the ratios; graphs on a second."""
        lines = []
        for key in dict.fromkeys((r["case"], r["dtype"]) for r in rows):
            by_name = {r["contender"]: r for r in rows if (r["case"], r["dtype"]) == key}
            lines.append(self._line(by_name, graph=False))
            if by_name.get("ours", {}).get("graph_ms"):
                lines.append(self._line(by_name, graph=True))
        return "".join(f"{line}\n" for line in lines)


def header(record: dict[str, Any], run: dict[str, Any]) -> str:
    """What the rows are of, and what they were measured on."""
    versions = run["versions"]
    cuda = f", CUDA {versions['cuda']}" if run["device"]["type"] == "cuda" else ""
    where = f"{run['device']['name']}, {run['threads']} threads, torch {versions['torch']}{cuda}"
    return f"{record['title']}\n{where}, {run['date'][:10]}\n{LEGEND}"


def ceilings_of(run: dict[str, Any], dtype: str) -> str:
    """What was measured of the device itself."""
    copy, product = (run["ceilings"][dtype][name] for name in ("copy_gbps", "matmul_tflops"))
    return f"{dtype}: copy {copy:.0f} GB/s, matrix product {product:.3g} TFLOP/s"


def remarks(run: dict[str, Any]) -> list[str]:
    """What was left out and why, and which targets were missed."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for skip in run["skipped"]:
        reasons.setdefault((skip["contender"], skip["reason"]), []).append(skip["case"])
    lines = [
        f"left out: {name} at {', '.join(dict.fromkeys(cases))}: {why}"
        for (name, why), cases in reasons.items()
    ]
    for row in run["rows"]:
        where, target = f"missed: {row['case']} {row['dtype']}", row["target"]
        most, took = row.get("most_ms"), row["ms"]["p50"]
        if most is not None and took > most:
            lines.append(f"{where}: {took:.3g} ms, at most {most:g} ms")
        if target is None:
            continue
        if row["contender"] == "ours":  # the better of its two times, against its floor
            factor = min(t["p50"] for t in (row["ms"], row["graph_ms"]) if t) / row["floor_ms"]
            if factor > target:
                lines.append(f"{where}: {factor:.1f}x its floor, target {target:g}x")
        elif judge(row) == "!":
            ratio = _multiple(row["ratio"])
            lines.append(f"{where}: {ratio}x {row['contender']}, target {target:g}x")
    return lines


def table(record: dict[str, Any], run: dict[str, Any]) -> str:
    """One run of a record, dtype by dtype; a column for each contender that it measured."""
    if record["schema"] == parity_table.SCHEMA:
        return parity_table.text(record, run)
    measured = {row["contender"] for row in run["rows"]}
    columns = Columns(
        max((len(row["case"]) for row in run["rows"]), default=0),
        [name for name in record["contenders"] if name in measured],
    )
    lines = [header(record, run)]
    for dtype in run["ceilings"]:
        rows = [row for row in run["rows"] if row["dtype"] == dtype]
        lines += [
            "",
            ceilings_of(run, dtype),
            columns.headings(),
            columns.lines_of(rows).rstrip("\n"),
        ]
    return "\n".join([*lines, "", *remarks(run)]).rstrip()


# What a record, a run and a row must hold to be read, and of which type.
NUMBER = (int, float)
ABSENT = type(None)
NUMBER_OR_NONE = (*NUMBER, ABSENT)
RECORD = {"op": str, "title": str, "contenders": dict, "runs": list}
RUN = {"date": str, "device": dict, "threads": int, "versions": dict, "ceilings": dict}
RUN |= {"rows": list, "skipped": list}
KEY = ("case", "dtype", "contender")
ROW = {"case": str, "dtype": str, "contender": str, "rounds": int, "ms": dict, "floor_ms": NUMBER}
ROW |= {"backend": (str, ABSENT), "graph_ms": (dict, ABSENT)}
ROW |= dict.fromkeys(("ratio", "target", "graph_ratio", "peak_mib"), NUMBER_OR_NONE)
# What a row may hold: newer records do.
MORE: dict[str, Any] = {"gbps": NUMBER_OR_NONE, "tflops": NUMBER_OR_NONE, "bound": (str, ABSENT)}
MORE |= {"most_ms": NUMBER_OR_NONE, "launches": (int, ABSENT), "error": NUMBER_OR_NONE}
MORE |= {"shares": (dict, ABSENT)}
RATES = dict.fromkeys(("copy_gbps", "matmul_tflops"), NUMBER)
TIMES = dict.fromkeys(("p20", "p50", "p80"), NUMBER)


def _check(what: Any, fields: dict[str, Any], where: str) -> None:
    """Raise ValueError, which names the place, where a field is absent or of another type."""
    for name, kind in fields.items():
        if not isinstance(what, dict) or name not in what or not isinstance(what[name], kind):
            raise ValueError(f"{where} has no valid {name!r}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def read(file: Path) -> dict[str, Any]:
    """The record of a file. Raises ValueError, which names the file, where it holds none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{file} is damaged: {error}") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema not in READABLE:
        raise ValueError(f"{file}: schema {schema!r}, this reads {READABLE}")
    if schema == parity_table.SCHEMA:
        _check_parity(record, file)
        return dict(record)
    _check(record, RECORD, str(file))
    for i, run in enumerate(record["runs"]):
        where = f"{file}: run {i}"
        _check(run, RUN, where)
        _check(run["device"], {"type": str, "name": str}, f"{where}: device")
        _check(run["versions"], {"torch": str}, f"{where}: versions")
        for j, skip in enumerate(run["skipped"]):
            _check(skip, dict.fromkeys((*KEY, "reason"), str), f"{where}: skipped {j}")
        for dtype, rates in run["ceilings"].items():
            _check(rates, RATES, f"{where}: ceilings of {dtype}")
        for j, row in enumerate(run["rows"]):
            _check_row(row, f"{where}: row {j}")
            _check(run["ceilings"], {row["dtype"]: dict}, f"{where}: ceilings")
    return record


def _check_row(row: Any, where: str) -> None:
    _check(row, ROW, where)
    _check(row, {name: kind for name, kind in MORE.items() if name in row}, where)
    shares = row.get("shares") or {}
    _check(shares, dict.fromkeys(shares, NUMBER), f"{where}: shares")
    for name in ("ms", "graph_ms"):
        if row[name] is None:
            continue
        _check(row[name], TIMES, f"{where}: {name}")
        if not all(0 < row[name][each] < float("inf") for each in TIMES):
            raise ValueError(f"{where}: {name} holds a time that is not positive")


def _check_parity(record: dict[str, Any], file: Path) -> None:
    """The same of a record of errors by precision, which has no times."""
    _check(record, {name: RECORD[name] for name in ("op", "title", "runs")}, str(file))
    for i, run in enumerate(record["runs"]):
        where = f"{file}: run {i}"
        _check(run, {name: kind for name, kind in RUN.items() if name != "ceilings"}, where)
        _check(run["versions"], {"torch": str, "peers": dict}, f"{where}: versions")
        for j, row in enumerate(run["rows"]):
            _check_errors(row, f"{where}: row {j}")
        for j, skip in enumerate(run["skipped"]):
            _check(skip, dict.fromkeys(("name", "contender", "why"), str), f"{where}: skipped {j}")
            _check_one_of(skip, "contender", [*parity_table.CONTENDERS], f"{where}: skipped {j}")


def _check_errors(row: Any, where: str) -> None:
    """A row of a record of errors: one is null where what it is of is not finite."""
    _check(row, dict.fromkeys(parity_table.FIELDS, str), where)
    _check_one_of(row, "contender", [*parity_table.CONTENDERS], where)
    for what in ("loss", "gradient"):
        _check_one_of(row, what, ["finite", "inf", "nan"], where)
        kind = NUMBER if row[what] == "finite" else ABSENT
        _check(row, {f"{what}_error": kind}, where)
    if row["precision"] == parity_table.SCALED:
        _check(row, {"scale": NUMBER, "settled_scale": NUMBER_OR_NONE}, where)


def _check_one_of(what: Any, name: str, known: list[str], where: str) -> None:
    if what[name] not in known:
        raise ValueError(f"{where} has no valid {name!r}: got {what[name]!r}, takes {known}")


def apart(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those of the records that hold times, and those of errors by precision."""
    parity = [record for record in records if record["schema"] == parity_table.SCHEMA]
    return [record for record in records if record["schema"] != parity_table.SCHEMA], parity


def in_order(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the ops first, as OPS has them."""
    order = [record["op"] for record in records]
    return sorted(records, key=lambda r: ([*OPS, *order].index(r["op"])))


def load(paths: list[Path]) -> list[dict[str, Any]]:
    """The records of the files, and of the folders' *.json. Raises ValueError as `read`."""
    files = [f for p in paths for f in (sorted(p.rglob("*.json")) if p.is_dir() else [p])]
    return in_order([read(file) for file in files])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bench.report", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help=f"default: {RESULTS}")
    parser.add_argument("--output", type=Path, help="write all of them as one HTML page here")
    parser.add_argument("--csv", type=Path, help="write every row of all of them here")
    parser.add_argument("--figure", type=Path, help="write the chart of one record here (PNG)")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OLD",
        help="in the place of the tables: what changed beyond noise since the records of OLD",
    )
    options = parser.parse_args(argv)
    paths, old = options.paths or [RESULTS], [options.compare] if options.compare else []
    missing = [str(path) for path in [*paths, *old] if not path.exists()]
    if missing:
        parser.error(f"no such file or folder: {', '.join(missing)}")
    try:
        return _write(options, paths)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _write(options: argparse.Namespace, paths: list[Path]) -> int:
    """What the options ask for; the tables where they ask for no file but the figure."""
    from bench import compare, flat, report_page

    folders = flat.collect(paths)
    records = in_order([r for folder in folders for r in (*folder.records, *folder.parity)])
    if options.figure and len(records) != 1:
        raise ValueError(f"--figure draws one record, here are {len(records)}: name its file")
    if not records:
        print("no results: run `make bench`", file=sys.stderr)
        return 1
    if options.compare:
        print(compare.told(compare.load_old(options.compare), compare.last(folders)))
    elif not (options.output or options.csv):
        print("\n\n".join(table(record, run) for record in records for run in record["runs"]))
    if options.output:
        report_page.write(folders, options.output)
        print(f"wrote {options.output}")
    if options.csv:
        flat.write_csv(flat.flattened(folders), options.csv)
        print(f"wrote {options.csv}")
    if options.figure:
        from bench.figure import draw

        draw(records[0], options.figure)
        print(f"wrote {options.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
