"""Where and with what a run was made: the header of every result file."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import vicreg_kernels
from vicreg_kernels.configs import slug
from vicreg_kernels.core import library

ROOT = Path(__file__).resolve().parents[1]


def processor() -> str:
    """The processor's model name."""
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return model.group(1).strip() if model else platform.processor() or platform.machine()


def cores() -> int:
    """The processors this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {processor()} {cores()} cores"


def default_folder(device: torch.device) -> Path:
    return ROOT / "bench" / "results" / slug(device_name(device))


def commit(folder: Path = ROOT) -> str | None:
    """A checkout's commit, marked when files differ from it; None in a copy without git."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def describe(device: torch.device) -> dict[str, Any]:
    info: dict[str, Any] = {"type": device.type, "name": device_name(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["capability"] = f"{properties.major}.{properties.minor}"
        info["multiprocessors"] = properties.multi_processor_count
        info["memory_gib"] = round(properties.total_memory / 2**30, 1)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": info,
        "host": {"processor": processor(), "cores": cores(), "system": platform.platform()},
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {
            "vicreg_kernels": vicreg_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": library.TRITON_VERSION,
        },
    }
