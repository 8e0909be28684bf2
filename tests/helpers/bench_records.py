"""Records of the benchmarks, made up for the tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import parity_table, report


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


def errors(**fields: Any) -> dict[str, Any]:
    """A record of errors by precision, with a row of each precision; fields: of each row."""
    about = {"op": "VICReg", "name": "some VICRegLoss", "contender": "theirs", "shape": "64x256"}
    figures = {"loss": "finite", "gradient": "finite", "loss_error": 1e-7, "gradient_error": 2e-7}
    rows: list[dict[str, Any]] = [
        {**about, **figures, "precision": precision, "scale": None, **fields}
        for precision in ("float32", "bfloat16", "float16")
    ]
    scaled = {"precision": parity_table.SCALED, "scale": 65536.0, "settled_scale": 2048.0}
    scaled |= {"gradient": "nan", "gradient_error": None}
    rows.append({**about, **figures, **scaled, **fields})
    made = record(rows, "parity")
    made["runs"][0]["versions"]["peers"] = {"some": "1.0"}
    del made["contenders"], made["runs"][0]["ceilings"]
    return made | {"schema": parity_table.SCHEMA, "title": "Relative errors by precision"}


def write(folder: Path, made: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{made['op']}.json"
    path.write_text(json.dumps(made))
    return path
