"""The trainer on two ranks is the trainer in one process, with copies and with shards; a run with
one resumes the other; and a rank that is killed is named.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vicreg_jepa.training import checkpoint
from vicreg_jepa.training.run import train

from tests.trainer import training_ranks

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300  # what takes longer hangs; a busy machine takes a minute for what takes seconds
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)


class Ranks:
    """torchrun of two ranks on words, in a session of its own that ends with the block."""

    def __init__(self, words: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python"))),
            # torchrun's options where the words do not give them
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": port,
        }
        command = [sys.executable, "-m", "torch.distributed.run", *words]
        self.process = subprocess.Popen(
            command, env=environment, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [*self.pids().values(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def pids(self) -> dict[int, int]:
        """Each rank's process."""
        by_rank = {}
        for entry in Path("/proc").iterdir():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == self.process.pid:
                    words = (entry / "environ").read_bytes().split(b"\0")
                    by_rank |= {
                        int(w[5:]): int(entry.name) for w in words if w.startswith(b"RANK=")
                    }
            except (OSError, IndexError, ValueError):
                continue
        return by_rank

    def finish(self, seconds: float = TIMEOUT) -> str:
        """What it printed."""
        return self.process.communicate(timeout=seconds)[0]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(folder: Path, *names: str) -> list[float]:
    return [row[name] for row in rows(folder) for name in names if name in row]


def begun(folder: Path, at: Path) -> Path:
    """A copy of a run as it was after step 2."""
    shutil.copytree(folder, at)
    shutil.rmtree(at / "checkpoints" / "step_00000004")
    (at / "metrics.jsonl").unlink()
    return at


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """one/<name>: in one process; two/<name>: on two ranks; two/<name>-resumed: begun in one."""
    root = tmp_path_factory.mktemp("ranks")
    for name in training_ranks.RUNS:
        train(training_ranks.settings(name, root, 1), root / "one" / name)
        (root / "two" / name).mkdir(parents=True)
    begun(root / "one" / "vjepa_shards", root / "two" / "vjepa_shards-resumed")
    with Ranks(
        ["--nproc-per-node", "2", str(ROOT / "tests/trainer/training_ranks.py"), str(root)]
    ) as run:
        text = run.finish()
        assert run.process.returncode == 0, text[-3000:]
    return root


@pytest.mark.parametrize("name", training_ranks.RUNS)
def test_two_ranks_are_one_process(name, trained):
    one, two = (
        figures(trained / side / name, "loss", "effective_rank", "std") for side in ("one", "two")
    )
    assert len(one) >= 4
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0)


def test_a_run_goes_on_with_other_ranks(trained, tmp_path):
    whole = figures(trained / "one" / "vjepa_shards", "loss")
    more = figures(trained / "two" / "vjepa_shards-resumed", "loss")
    torch.testing.assert_close(more, whole[2:], rtol=1e-5, atol=0)
    fewer = begun(trained / "two" / "vjepa_shards", tmp_path / "fewer")
    train(training_ranks.settings("vjepa_shards", trained, 1), fewer)
    torch.testing.assert_close(figures(fewer, "loss"), whole[2:], rtol=1e-5, atol=0)


def test_shards_take_several_processes(tmp_path):
    made = training_ranks.settings("ijepa_shards", tmp_path, 2)
    with pytest.raises(ValueError, match=r"training\.parallel: got 'fsdp' in one process"):
        train(made, tmp_path)


def until(run: Ranks, reached: Callable[[], bool], seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert run.process.poll() is None, run.process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def words_of(folder: Path, *words: str) -> list[str]:
    """What torchrun is given for a run of two ranks with a step of milliseconds."""
    given = ["train", "vicreg_digits", "model.dim=16", "model.expander=[16, 32]", *words]
    given += ["training.batch=16", "training.steps=9000", "--output", str(folder)]
    return ["--nproc-per-node", "2", "-m", "vicreg_jepa", *given]


def check_stopped(folder: Path, text: str, number: str) -> None:
    """All ranks saved after the last step, and one line says how to resume."""
    lines = [line for line in text.splitlines() if line.startswith("vicreg-jepa: ")]
    steps = len(rows(folder))
    path = checkpoint.newest(folder / "checkpoints")
    assert path.name == f"step_{steps:08d}"
    assert len(lines) == 1, text
    assert lines[0].startswith(f"vicreg-jepa: stopped by {number}"), text
    assert lines[0].endswith(f"; the same command resumes at step {steps} ({path})")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("number", "told"), [("SIGTERM", "one"), ("SIGTERM", "all"), ("SIGINT", "all")]
)
def test_ranks_that_are_told_to_stop_save_first(number, told, tmp_path):
    """One rank gets the signal, or torchrun, which tells all; the resumed run is the same run."""
    folder = tmp_path / "run"
    words = words_of(folder, "training.save_every=9000")

    def seen() -> int:
        return len(rows(folder)) if (folder / "metrics.jsonl").exists() else 0

    with Ranks(words) as run:
        until(run, lambda: seen() >= 5)
        target = run.pids()[1] if told == "one" else run.process.pid
        os.kill(target, signal.Signals[number])
        text = run.finish()
        assert run.process.returncode != 0
    check_stopped(folder, text, number)
    first = rows(folder)
    with Ranks(words) as run:
        until(run, lambda: seen() >= len(first) + 5)
        run.process.terminate()
        run.finish()
    with Ranks(words_of(tmp_path / "whole", "training.save_every=9000")) as run:
        until(run, lambda: (tmp_path / "whole" / "metrics.jsonl").exists())
        until(run, lambda: len(rows(tmp_path / "whole")) >= len(first) + 5)
        run.process.terminate()
        run.finish()
    again, whole = figures(folder, "loss"), figures(tmp_path / "whole", "loss")
    assert again[: len(first) + 5] == whole[: len(first) + 5]
    assert [row["step"] for row in rows(folder)] == list(range(1, len(again) + 1))


def test_a_killed_rank_is_named_and_the_run_goes_on(tmp_path):
    """The message's command takes the same steps as the run that was killed. Then one rank is told
    to stop, and all save.
    """
    folder = tmp_path / "run"
    start = words_of(folder, "training.save_every=10")

    def seen() -> int:
        return len(rows(folder)) if (folder / "metrics.jsonl").exists() else 0

    with Ranks(start) as run:
        until(run, lambda: seen() >= 15)
        os.kill(run.pids()[1], signal.SIGKILL)
        text = run.finish()
        assert run.process.returncode != 0
    first = rows(folder)
    step = int(checkpoint.newest(folder / "checkpoints").name.removeprefix("step_"))
    assert re.search(r"rank 1 of 2 \(process \d+\) was killed by signal 9 \(SIGKILL\)", text), text
    assert f"resumes at step {step} " in text
    (command,) = re.findall(r"^    torchrun (.*)$", text, re.MULTILINE)
    with Ranks(shlex.split(command)) as run:
        until(run, lambda: seen() > len(first))
        os.kill(run.pids()[1], signal.SIGTERM)
        text = run.finish()
        assert run.process.returncode != 0
    check_stopped(folder, text, "SIGTERM")
    assert len(first) > step
    again = rows(folder)
    assert [row["loss"] for row in again[: len(first)]] == [row["loss"] for row in first]
    assert [row["step"] for row in again] == list(range(1, len(again) + 1))
