"""The scripts of docs/examples train: the loss falls, and the features beat those of the untrained
encoder. Those of a package that is not installed are skipped.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import types
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


class Ended(Exception):
    """Of a script, where its first batch would be drawn."""


def stand_in(name: str, rank: int) -> types.ModuleType:
    """accelerate or lightning, of which this process is a rank; training ends with its first step,
    which tells what the rank draws.
    """

    def end(*args):
        raise Ended(float(torch.randn(())))

    module = types.ModuleType(name)
    if name == "accelerate":
        prepare = lambda *parts: (*parts[:2], Ends())  # noqa: E731
        settings = {"process_index": rank, "num_processes": 2, "print": print}
        Ends = type("Ends", (), {"__len__": lambda self: 1, "__iter__": end})
        module.Accelerator = lambda: types.SimpleNamespace(prepare=prepare, **settings)
    else:
        module.LightningModule = type("Module", (torch.nn.Module,), {"global_rank": rank})
        fit = lambda self, model, loader: (model.configure_optimizers(), end())  # noqa: E731
        module.Trainer = type("Trainer", (), {"__init__": lambda self, **rest: None, "fit": fit})
    return module


@pytest.mark.parametrize("name", NEEDS)
def test_each_rank_draws_views_of_its_own(name, monkeypatch, capsys):
    """And begins with the same encoder."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", [name, "1"])
    drawn, printed = [], []
    for rank in range(2):
        monkeypatch.setitem(sys.modules, NEEDS[name], stand_in(NEEDS[name], rank))
        with torch.random.fork_rng(), pytest.raises(Ended) as ended:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        drawn.append(ended.value.args[0])
        printed.append(capsys.readouterr().out)
    assert drawn[0] != drawn[1]
    assert printed[0] == printed[1]
    assert "untrained: accuracy" in printed[0]


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
