"""An environment that holds one wheel and nothing else of this checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch


def environment(wheel: Path, folder: Path) -> Path:
    """Makes it in `folder`, which must not exist; the path of its Python.

    torch is too large to install again: the directory that this Python's lies in is put behind the
    environment's own, so that the environment imports torch and what torch needs from there.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    pip += ["--disable-pip-version-check", "--root-user-action", "ignore", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    (site / "torch_only.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    return folder / "bin" / "python"
