"""The scripts of docs/examples train: the loss falls, and the features beat those of the untrained
encoder. Those of a package that is not installed are skipped.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
# What a script imports beside this library and what its tests need.
NEEDS = {"lightning_module": "lightning", "accelerate_teacher": "accelerate"}
MOST_LINES = 60


def check(printed: str) -> list[float]:
    """The losses of the epochs."""
    losses = [float(loss) for loss in re.findall(r"epoch \d+: loss ([\d.]+)", printed)]
    before, after = (
        float(*re.findall(rf"\b{word}: accuracy ([\d.]+)", printed))
        for word in ("untrained", "trained")
    )
    assert losses[-1] < losses[0] - 0.5, printed
    assert after > before + 0.02, printed
    return losses


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "torchrun_ranks"])
def test_it_trains(name, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} needs {NEEDS[name]}, not installed here")
    monkeypatch.setattr(sys, "argv", [name, "3"])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    assert len(check(capsys.readouterr().out)) == 3


@pytest.mark.thorough  # 12 seconds of CPU: three processes import torch
def test_it_trains_on_two_ranks():
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(FOLDER / "torchrun_ranks.py"), "3"]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    by_rank = [re.findall(rf"^rank {rank}, (.*)$", done.stdout, re.M) for rank in range(2)]
    losses = [check("\n".join(lines)) for lines in by_rank]
    assert losses[0] == losses[1], "the loss is that of all ranks' rows"


def test_a_script_that_does_not_train_is_found():
    good = "untrained: accuracy 0.8\nepoch 0: loss 20.0\nepoch 1: loss 15.0\ntrained: accuracy 0.9"
    assert check(good) == [20.0, 15.0]
    for bad in (good.replace("15.0", "20.0"), good.replace("0.9", "0.8")):
        with pytest.raises(AssertionError):
            check(bad)


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_is_short_and_shown(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < MOST_LINES
    page = (ROOT / "docs" / "examples.md").read_text()
    assert f"{{literalinclude}} examples/{name}.py\n" in page
