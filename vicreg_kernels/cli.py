"""`vicreg-kernels info | bench | audit | report`.

`info` needs the package alone; the others run the benchmarks, the audit of the compiled Triton
kernels and the tables of results of a source checkout.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vicreg_kernels import __version__, dispatch, library
from vicreg_kernels.attention import backends as attention

OPS = ("vicreg", "sigreg", "barlow", "vicregl", "attention", "rope", "tokens", "ema")
DTYPES = ("float32", "bfloat16", "float16", "float64")
CHECKOUT = Path(__file__).resolve().parents[1]


def _nvcc() -> str | None:
    """nvcc's release, for example 13.0."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        return None
    try:
        text = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    release = re.search(r"release (\S+),", text.stdout)
    return release.group(1) if release else None


def _devices() -> list[str]:
    names = ["cpu"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            names.append(f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return names


def _chosen(op: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that runs op, and where sizes decide another one."""

    def choose(side: int | None = None, tokens: int | None = None) -> str:
        unfit = None if tokens is None else attention.unfit(dtype, tokens)
        try:
            return dispatch.choose(op, None, device_type, dtype, side, unfit)
        except RuntimeError as error:  # VICREG_KERNELS_BACKEND names one that cannot run here
            return f"none: {error}"

    small, large, where = choose(), choose(), ""
    if op == "vicreg":
        large = choose(side=dispatch.TRIANGULAR_FROM + 1)
        where = f"min(N, D) > {dispatch.TRIANGULAR_FROM}"
    if op == "attention":
        most = attention.LONGEST_IN_SHARED
        small, large = choose(tokens=most), choose(tokens=most + 1)
        where = f"a sample has more than {most} tokens"
    return small if small == large else f"{small}; {large} where {where}"


def info() -> dict[str, Any]:
    """Versions, devices, which libraries loaded and if not why, and what would run for each op."""
    missing = {
        "_C (cpu)": library.CPU_MISSING,
        "_C_cuda (cuda)": library.CUDA_MISSING,
        "triton": library.TRITON_MISSING,
    }
    device_types = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    notes = []
    if library.CPU_MISSING is not None and library.CUDA_MISSING is not None:
        notes.append("pure Python: no compiled library is loaded")
    return {
        "versions": {
            "vicreg-kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": library.TRITON_VERSION,
            "CUDA of torch": torch.version.cuda,
            "nvcc": _nvcc(),
        },
        "devices": _devices(),
        "libraries": {name: why or "loaded" for name, why in missing.items()},
        "VICREG_KERNELS_BACKEND": dispatch.ENVIRONMENT_BACKEND,
        "backends": {
            op: {
                device: {name: _chosen(op, device, getattr(torch, name)) for name in DTYPES}
                for device in device_types
            }
            for op in OPS
        },
        "notes": notes,
    }


def _text(found: dict[str, Any]) -> str:
    lines = [f"{name:<16}{value or '-'}" for name, value in found["versions"].items()]
    lines += [f"{'device':<16}{name}" for name in found["devices"]]
    lines += ["", "libraries"]
    lines += [f"  {name:<16}{state}" for name, state in found["libraries"].items()]
    lines += [f"  {note}" for note in found["notes"]]
    named = found["VICREG_KERNELS_BACKEND"]
    lines += ["", "backend that runs" + (f" (VICREG_KERNELS_BACKEND={named})" if named else "")]
    for op, devices in found["backends"].items():
        for device, by_dtype in devices.items():
            lines += [f"  {op:<10}{device:<6}{dtype:<10}{b}" for dtype, b in by_dtype.items()]
    return "\n".join(lines)


def _in_checkout(needs: str, command: list[str]) -> int:
    """Run command in the source checkout; an error where `needs` says there is none."""
    if not (CHECKOUT / needs).exists():
        print(
            f"vicreg-kernels: {needs} is not here: it is part of the source checkout, not of the "
            "installed package. Run this from a clone installed with `pip install -e .`.",
            file=sys.stderr,
        )
        return 2
    return subprocess.run([sys.executable, *command], cwd=CHECKOUT).returncode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vicreg-kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("info", help="versions, devices, libraries, which backend would run")
    one.add_argument("--json", action="store_true", help="as JSON")
    passed = {
        "bench": "the quick benchmark; options as of `python3 -m bench.run`, for example --op",
        "audit": "compile the Triton kernels ahead of time: registers, shared memory, spills",
        "report": "the tables of bench/results; options as of `python3 -m bench.report`",
    }
    for name, text in passed.items():
        commands.add_parser(name, help=text, add_help=False)
    options, rest = parser.parse_known_args(argv)
    if options.command == "info":
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        found = info()
        print(json.dumps(found, indent=1) if options.json else _text(found))
        return 0
    if options.command == "bench":
        selected = any(word.startswith(("--cases", "--quick")) for word in rest)
        quick = [] if selected else ["--quick"]
        return _in_checkout("bench/run.py", ["-m", "bench.run", *quick, *rest])
    if options.command == "report":
        return _in_checkout("bench/report.py", ["-m", "bench.report", *rest])
    if importlib.util.find_spec("pytest") is None:
        print("vicreg-kernels: the audit runs under pytest, which is missing", file=sys.stderr)
        return 2
    os.environ.setdefault("VICREG_KERNELS_AUDIT", "all")  # every architecture
    audits = sorted(str(p) for p in (CHECKOUT / "tests").glob("test_*_audit_triton.py"))
    return _in_checkout("tests/audit_triton.py", ["-m", "pytest", "-s", "-rs", *audits, *rest])


if __name__ == "__main__":
    sys.exit(main())
