"""Tables and the figure of bench/results: medians, ratios and targets. Needs no torch.

python3 -m bench.report [FILE_OR_FOLDER ...] [--figure docs/assets/speed_cpu.png]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.cases import FLOOR_FACTOR, TARGETS

RESULTS = Path(__file__).resolve().parent / "results"
# JSON name -> table heading. Baselines are shown as multiples of ours.
BASELINES = {
    "eager": "eager",
    "compiled": "eager-c",
    "gram_plain": "gram",
    "gram_compiled": "gram-c",
    "gram_best": "best",
    "lightly": "lightly",
    "metric_learning": "pml",
}
WIDTH = 110


def _row(cells: list[str]) -> str:
    shape, dtype, backend, *numbers = cells
    widths = (10, 9, 8, *(8 for _ in BASELINES))
    text = f"{shape:<11}{dtype:<6}{backend:<10}"
    text += "".join(f"{n:>{w}}" for n, w in zip(numbers, widths, strict=True))
    return text.rstrip()


def header(run: dict[str, Any], dtype: str) -> str:
    """What the rows below were measured on, and their headings."""
    versions, limits = run["versions"], run["ceilings"][dtype]
    cuda = f", CUDA {versions['cuda']}" if run["device"]["type"] == "cuda" else ""
    return "\n".join(
        (
            f"{run['device']['name']}, {run['threads']} threads, torch {versions['torch']}{cuda}, "
            f"{run['date'][:10]}",
            f"{dtype}: copy {limits['copy_gbps']:.0f} GB/s, matrix product "
            f"{limits['matmul_tflops']:.3g} TFLOP/s. Forward and backward: p50 of ours, its share",
            "of the floor, its peak memory, and each baseline as a multiple of ours (median of "
            "interleaved rounds;",
            "* target met, ! missed). -c: under torch.compile; best: the best plain-PyTorch Gram "
            "version.",
            _row(["shape", "dtype", "ours", "ms", "MiB", "floor%", *BASELINES.values()]),
        )
    )


def judge(row: dict[str, Any], device: str, key: str = "ratio") -> str:
    """ "*" where the row's ratio reaches its target, "!" where not, " " where it has none."""
    target = TARGETS.get(device, {}).get(row["shape"], {}).get(row["contender"])
    if target is None or row[key] is None:
        return " "
    if device == "cpu" and row["dtype"] != "float32":
        return " "
    return "*" if row[key] >= target else "!"


def _multiple(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _size(mib: float) -> str:
    return f"{mib:.1f}" if mib < 1000 else f"{mib:.0f}"


def _line(by_name: dict[str, dict[str, Any]], device: str, graph: bool) -> str:
    """Of one shape and dtype; graph: of the replays of CUDA graphs, without the host's share."""
    times, ratios = ("graph_ms", "graph_ratio") if graph else ("ms", "ratio")
    row = next(iter(by_name.values()))
    cells = [row["shape"], row["dtype"].replace("float", "f")]
    mine = by_name.get("ours")
    if mine is None:
        cells += ["-"] * 4
    else:
        p50 = mine[times]["p50"]
        floor = f"{100 * mine['floor_ms'] / p50:.0f}"
        backend = mine["backend"]
        cells += ["  as graph" if graph else backend, f"{p50:.3g}", _size(mine["peak_mib"]), floor]
    for name in BASELINES:
        row = by_name.get(name, {})
        if not row.get(times):
            cells.append("-")
        elif row[ratios] is None:
            cells.append(f"{row[times]['p50']:.3g} ms")
        else:
            cells.append(f"{_multiple(row[ratios])}x{judge(row, device, ratios)}")
    return _row(cells)


def lines_of(rows: list[dict[str, Any]], device: str) -> str:
    """One line a shape and dtype, ours first, then the baselines' ratios; graphs on a second."""
    lines = []
    for key in dict.fromkeys((r["shape"], r["dtype"]) for r in rows):
        by_name = {r["contender"]: r for r in rows if (r["shape"], r["dtype"]) == key}
        lines.append(_line(by_name, device, graph=False))
        if by_name.get("ours", {}).get("graph_ms"):
            lines.append(_line(by_name, device, graph=True))
    return "\n".join(lines)


def remarks(run: dict[str, Any]) -> list[str]:
    """What was left out and why, and which targets were missed."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for skip in run["skipped"]:
        reasons.setdefault((skip["contender"], skip["reason"]), []).append(skip["shape"])
    lines = [
        f"left out: {name} at {', '.join(dict.fromkeys(shapes))}: {why}"
        for (name, why), shapes in reasons.items()
    ]
    device = run["device"]["type"]
    for row in run["rows"]:
        where = f"{row['shape']} {row['dtype']}"
        if judge(row, device) == "!":
            target = TARGETS[device][row["shape"]][row["contender"]]
            lines.append(
                f"missed: {where}: {_multiple(row['ratio'])}x {row['contender']}, target {target}x"
            )
        if device == "cuda" and row["contender"] == "ours":
            best = min(t["p50"] for t in (row["ms"], row["graph_ms"]) if t)
            if best > FLOOR_FACTOR * row["floor_ms"]:
                factor = best / row["floor_ms"]
                lines.append(f"missed: {where}: {factor:.1f}x its floor, target {FLOOR_FACTOR}x")
    return lines


def table(run: dict[str, Any]) -> str:
    device = run["device"]["type"]
    blocks = []
    for dtype in run["ceilings"]:
        rows = [row for row in run["rows"] if row["dtype"] == dtype]
        blocks.append(f"{header(run, dtype)}\n{lines_of(rows, device)}")
    return "\n\n".join([*blocks, "\n".join(remarks(run))]).rstrip()


def load(paths: list[Path]) -> list[dict[str, Any]]:
    """The runs of the files, and of the folders' *.json."""
    files = [f for p in paths for f in (sorted(p.rglob("*.json")) if p.is_dir() else [p])]
    return [run for file in files for run in json.loads(file.read_text())["runs"]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bench.report", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help=f"default: {RESULTS}")
    parser.add_argument("--figure", type=Path, help="write the chart of the first run here (PNG)")
    options = parser.parse_args(argv)
    missing = [str(path) for path in options.paths if not path.exists()]
    if missing:
        parser.error(f"no such file or folder: {', '.join(missing)}")
    runs = load(options.paths or [RESULTS])
    if not runs:
        print("no results: run `make bench`", file=sys.stderr)
        return 1
    print("\n\n".join(table(run) for run in runs))
    if options.figure:
        from bench.figure import draw

        draw(runs[0], options.figure)
        print(f"wrote {options.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
