"""Small runs, and what tests of their folders and of their ends share."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from vicreg_jepa import cli, config

SMALL = ["training.batch=16", "model.dim=8", "model.expander=[8, 16]", "training.save_every=2"]
SMALL += ["training.log_every=2"]


def train(folder: Path, steps: int = 6, *words: str) -> int:
    given = config.layered([*SMALL, f"training.steps={steps}"], words)
    return cli.main(["train", "vicreg_digits", *given, "--output", str(folder)])


@cache
def trained() -> Path:
    parent = Path(tempfile.mkdtemp(prefix="vicreg_jepa_runs_"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    assert train(parent / "run") == 0
    return parent / "run"


def a_run(tmp_path: Path, capsys) -> Path:
    """A copy of a run of six steps, with checkpoints of steps 4 and 6, trained once a process."""
    copied = shutil.copytree(trained(), tmp_path / "run")
    capsys.readouterr()
    return Path(copied)


def steps_of(folder: Path) -> list[int]:
    return column(folder, "step")


def column(folder: Path, name: str) -> list:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


def said(capsys) -> str:
    """What was said, which is never a traceback."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"
