"""Records of the benchmarks, made up for the tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import report


def row(case: str, contender: str, p50: float, **fields: Any) -> dict[str, Any]:
    """Of float32; p20 and p80 are 2 % below and above p50, of 9 rounds."""
    made = {"case": case, "dtype": "float32", "contender": contender, "rounds": 9}
    made |= {"backend": "cpu" if contender == "ours" else None, "target": None, "ratio": None}
    made |= {"ms": {"p20": p50 / 1.02, "p50": p50, "p80": p50 * 1.02}, "peak_mib": 10.0}
    made |= {"graph_ms": None, "graph_ratio": None, "gbps": 0.0, "tflops": 0.0, "launches": None}
    return made | {"bound": "bytes", "floor_ms": 0.0, "percent_of_floor": 0.0} | fields


def record(rows: list[dict[str, Any]], op: str = "vicreg", **fields: Any) -> dict[str, Any]:
    """One run, on a CPU; fields: of the run."""
    run = {
        "command": "python3 -m bench.run",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc1234",
        "device": {"type": "cpu", "name": "Some CPU"},
        "threads": 2,
        "versions": {"torch": "2.13.0+cpu", "cuda": None, "vicreg_kernels": "0.1.0"},
        "ceilings": {"float32": {"copy_gbps": 20.0, "matmul_tflops": 0.2}},
        "rows": rows,
        "skipped": [],
    }
    names = {each["contender"] for each in rows} - {"ours"}
    title = "A loss, forward and backward, by batch x dimensions"
    made = {"schema": report.SCHEMA, "op": op, "title": title, "runs": [run | fields]}
    return made | {"contenders": {name: f"the {name} one" for name in sorted(names)}}


def write(folder: Path, made: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{made['op']}.json"
    path.write_text(json.dumps(made))
    return path
