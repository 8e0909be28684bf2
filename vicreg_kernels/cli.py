"""`vicreg-kernels info | bench | audit | report`.

`info` needs the package alone; the others run the benchmarks (with --tune: what is measured on a
GPU for vicreg_kernels/configs), the audit of the compiled Triton kernels and the tables, the page
and the CSV of results of a source checkout.
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

from vicreg_kernels import __version__, configs
from vicreg_kernels.core import dispatch, library, registry

DTYPES = ("float32", "bfloat16", "float16", "float64")
CHECKOUT = Path(__file__).resolve().parents[1]


def _nvcc() -> str | None:
    """nvcc's release, for example 13.0."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20)
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


def _cuda_devices() -> dict[str, torch.device]:
    """By what the report calls them: one of each kind of GPU that torch sees."""
    if not torch.cuda.is_available():
        return {}
    kinds = {torch.cuda.get_device_name(i): i for i in reversed(range(torch.cuda.device_count()))}
    places = sorted(kinds.values())
    one = len(places) == 1
    return {"cuda" if one else f"cuda:{i}": torch.device("cuda", i) for i in places}


def _chosen(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs op, and from which size on another does."""
    try:
        (_, first), *others = registry.choices(op, device, dtype)
    except RuntimeError as error:  # VICREG_KERNELS_BACKEND names one that cannot run here
        return f"none: {error}"
    of = registry.names()[op].of
    return "; ".join([first, *(f"{name} where {of} >= {least}" for least, name in others)])


def _measured(device: torch.device) -> str:
    """What this GPU's launch configurations and thresholds rest on."""
    name = torch.cuda.get_device_name(device)
    path = configs.path_of(name)
    if not path.exists():
        return "general ones, chosen by counting; `vicreg-kernels bench --tune` measures"
    return f"measured {configs.load(name)['measured'].get('date', '')}: {path}"


def info() -> dict[str, Any]:
    """Versions, devices, which libraries loaded and if not why, and what would run for each op."""
    missing = {
        "_C (cpu)": library.CPU_MISSING,
        "_C_cuda (cuda)": library.CUDA_MISSING,
        "triton": library.TRITON_MISSING,
    }
    cuda = _cuda_devices()
    devices = {"cpu": torch.device("cpu"), **cuda}
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
                name: {dtype: _chosen(op, device, getattr(torch, dtype)) for dtype in DTYPES}
                for name, device in devices.items()
            }
            for op in registry.names()
        },
        "configurations": {name: _measured(device) for name, device in cuda.items()},
        "notes": notes,
    }


def _text(facts: dict[str, Any]) -> str:
    lines = [f"{name:<16}{value or '-'}" for name, value in facts["versions"].items()]
    lines += [f"{'device':<16}{name}" for name in facts["devices"]]
    lines += ["", "libraries"]
    lines += [f"  {name:<16}{state}" for name, state in facts["libraries"].items()]
    lines += [f"  {note}" for note in facts["notes"]]
    named = facts["VICREG_KERNELS_BACKEND"]
    lines += ["", "backend that runs" + (f" (VICREG_KERNELS_BACKEND={named})" if named else "")]
    for op, devices in facts["backends"].items():
        for device, by_dtype in devices.items():
            lines += [f"  {op:<18}{device:<7}{dtype:<10}{b}" for dtype, b in by_dtype.items()]
    if facts["configurations"]:
        lines += ["", "launch configurations of the Triton kernels"]
        lines += [f"  {device:<7}{text}" for device, text in facts["configurations"].items()]
    return "\n".join(lines)


def _in_checkout(needs: str, command: list[str], folder: Path | None = None) -> int:
    """Run a command of the source checkout; an error where `needs` says there is none. folder:
    where it runs; by default where the caller is, so that the paths it is given are the caller's.
    """
    if not (CHECKOUT / needs).exists():
        print(
            f"vicreg-kernels: {needs} is not here: it is part of the source checkout, not of the "
            "installed package. Run this from a clone installed with `pip install -e .`.",
            file=sys.stderr,
        )
        return 2
    paths = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    # The caller's folder may hold another `bench`: it stays off the path, from Python 3.11 on.
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=os.environ | variables)
    return done.returncode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vicreg-kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("info", help="versions, devices, libraries, which backend would run")
    one.add_argument("--json", action="store_true", help="as JSON")
    passed = {
        "bench": "the quick benchmark; options as of `python3 -m bench.run`, for example --op. "
        "With --tune: measure launch configurations and thresholds; as of `python3 -m bench.tune`",
        "audit": "compile the Triton kernels ahead of time: registers, shared memory, spills",
        "report": "the tables of bench/results; with --output: a page of result folders side by "
        "side; options as of `python3 -m bench.report`",
    }
    for name, text in passed.items():
        commands.add_parser(name, help=text, add_help=False)
    options, rest = parser.parse_known_args(argv)
    if options.command == "info":
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        facts = info()
        print(json.dumps(facts, indent=1) if options.json else _text(facts))
        return 0
    if options.command == "bench":
        if "--tune" in rest:
            rest.remove("--tune")
            return _in_checkout("bench/tune.py", ["-m", "bench.tune", *rest])
        selected = any(word.startswith(("--cases", "--quick")) for word in rest)
        quick = [] if selected else ["--quick"]
        return _in_checkout("bench/run.py", ["-m", "bench.run", *quick, *rest])
    if options.command == "report":
        return _in_checkout("bench/report.py", ["-m", "bench.report", *rest])
    if importlib.util.find_spec("pytest") is None:
        print("vicreg-kernels: the audit runs under pytest, which is missing", file=sys.stderr)
        return 2
    os.environ.setdefault("VICREG_KERNELS_AUDIT", "all")  # every architecture
    audits = sorted(str(p) for p in (CHECKOUT / "tests").glob("*/test_audit_triton.py"))
    return _in_checkout(
        "tests/helpers/audit_triton.py", ["-m", "pytest", "-s", "-rs", *audits, *rest], CHECKOUT
    )


if __name__ == "__main__":
    sys.exit(main())
