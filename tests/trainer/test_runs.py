"""A run's folder: nothing twice in its log, whole checkpoints, one run at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from vicreg_jepa.training import checkpoint, locking
from vicreg_jepa.training.run import restore

from tests.trainer.runs import a_run, checkpoint_of, column, said, steps_of, train


@pytest.fixture
def run(tmp_path, capsys) -> Path:
    return a_run(tmp_path, capsys)


# ------------------------------------------------------------------------------ the log


def test_no_step_stands_twice_in_the_log(run):
    """As after a kill: rows that came after the checkpoint, and half a line."""
    first = (run / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(checkpoint_of(run, 6))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert train(run, 9) == 0
    assert steps_of(run) == list(range(1, 10))
    assert (run / "metrics.jsonl").read_text().splitlines()[:4] == first[:4]


def test_a_log_without_a_checkpoint_begins_anew(run):
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0}\n{"ste')
    assert train(run) == 0
    assert steps_of(run) == list(range(1, 7))


def test_rows_that_older_runs_wrote_twice_are_told_apart(run):
    text = (run / "metrics.jsonl").read_text()
    lines = text.splitlines()
    mixed = [*lines[:3], "", "null", '{"loss": 1}', lines[1][:9] + lines[1], *lines[1:]]
    (run / "metrics.jsonl").write_text("\n".join(mixed))
    assert train(run, 7) == 0
    assert steps_of(run) == list(range(1, 8))
    assert (run / "metrics.jsonl").read_text().startswith(text)


def test_tensorboard_is_told_which_steps_come_again(run, monkeypatch):
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            told.append((Path(folder).name, purge_step))

        def add_scalar(self, name, value, step):
            pass

        def close(self):
            pass

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    shutil.rmtree(checkpoint_of(run, 6))
    assert train(run, 7) == 0
    assert told == [("tensorboard", 5)]


def test_tensorboard_shows_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tmp_path / "run") == 0
    shutil.rmtree(checkpoint_of(tmp_path / "run", 6))
    assert train(tmp_path / "run", 7) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 8))


# ------------------------------------------------------------------------------ checkpoints


def edited(path: Path, **changes) -> None:
    record = json.loads(path.read_text())
    record.update(changes)
    path.write_text(json.dumps(record))


def test_an_edited_state_is_refused(run, capsys):
    state = checkpoint_of(run, 6) / "state.json"
    whole = state.read_text()
    shutil.rmtree(checkpoint_of(run, 4))
    held = json.loads(whole)["state"]
    betas = json.loads(json.dumps(held).replace("0.999", "0.99"))
    assert betas != held
    for change in ({"step": 5}, {"state": betas}, {"sha256": "0" * 64}, {"more": 1}):
        state.write_text(whole)
        edited(state, **change)
        assert train(run, 8) == 2
        assert "state.json: its contents are not those that were written" in said(capsys)
    state.write_text(json.dumps(json.loads(whole), indent=4))  # the same contents
    assert train(run, 8) == 0


def test_a_checkpoint_under_another_name_is_refused(run, capsys):
    shutil.rmtree(checkpoint_of(run, 4))
    checkpoint_of(run, 6).rename(checkpoint_of(run, 5))
    assert train(run, 8) == 2
    assert "is of step 6, its folder's name says 5" in said(capsys)


def test_another_format_is_no_damage(run, capsys):
    """A newer or older version's checkpoint: nothing is fallen back to."""
    for format in ("jepa-checkpoint/1", "jepa-checkpoint/2", "vicreg-jepa-checkpoint/99"):
        state = checkpoint_of(run, 6) / "state.json"
        record = json.loads(state.read_text())
        record.pop("checksum", None)
        record["format"] = format
        state.write_text(json.dumps(record if format.endswith("1") else checkpoint.sealed(record)))
        assert train(run, 8) == 2
        assert f"has format '{format}', takes 'vicreg-jepa-checkpoint/1'" in said(capsys)


def damage(kind: str, path: Path) -> None:
    tensors, state = path / "tensors.safetensors", path / "state.json"
    content = tensors.read_bytes()
    if kind == "cut":
        tensors.write_bytes(content[:-1])
    elif kind == "flipped":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif kind == "no tensors":
        tensors.unlink()
    elif kind == "no state":
        state.unlink()
    elif kind == "half a state":
        state.write_text(state.read_text()[:100])
    elif kind == "deep":
        state.write_text("[" * 100000)
    elif kind == "a file":
        shutil.rmtree(path)
        path.write_bytes(b"")
    else:
        edited(state, step=3)


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_a_pipe_in_a_checkpoint_is_not_opened(name, run, capsys):
    (checkpoint_of(run, 6) / name).unlink()
    os.mkfifo(checkpoint_of(run, 6) / name)
    assert restore(run)[2] == 4
    assert name in said(capsys)


def test_a_pipe_in_the_place_of_the_log_is_not_opened(run, capsys):
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    assert train(run, 8) == 2
    assert "metrics.jsonl: is no regular file: move it, or give another --output" in said(capsys)


KINDS = ("cut", "flipped", "no tensors", "no state", "half a state", "deep", "a file", "edited")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(kind, run, tmp_path, capsys):
    whole = column(run, "loss")
    damage(kind, checkpoint_of(run, 6))
    assert restore(run)[2] == 4
    assert "step_00000006" in said(capsys)
    assert train(run) == 0
    text = said(capsys)
    assert "step_00000006" in text
    assert "resuming at step 4" in text
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000006", "step_00000006.damaged"]
    assert column(run, "loss") == whole


def test_a_damaged_checkpoint_does_not_count_as_kept(run):
    """It would be the newest, and the one before it, just written, removed."""
    damage("cut", checkpoint_of(run, 6))
    assert train(run, 5, "training.keep=1") == 0
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000005", "step_00000006.damaged"]


def test_without_a_whole_checkpoint_the_newest_one_is_named(run, capsys):
    for step in (4, 6):
        damage("cut", checkpoint_of(run, step))
    assert train(run) == 2
    text = said(capsys)
    assert "step_00000006" in text
    assert "truncated" in text
    assert not list((run / "checkpoints").glob("*.damaged"))


def test_another_runs_checkpoint_is_no_damage(run, capsys):
    assert train(run, 8, "seed=1") == 2
    assert "was written with seed 0, this run has 1: give another output folder" in said(capsys)


def test_how_files_are_read_may_change(run):
    assert train(run, 7, "data.workers=1") == 0


# ------------------------------------------------------------------------------ one run at a time


HOLD = """
import sys, time
from pathlib import Path
from vicreg_jepa.training import locking
with locking.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)  # it is killed before
"""


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[int]:
    """Another process that holds the folder: its number."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_two_runs_in_one_folder_are_refused(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    with holder(run) as pid:
        assert train(run, 9) == 2
        text = said(capsys)
        assert f"process {pid} on {socket.gethostname()}" in text
        assert "another --output" in text
        assert (run / "metrics.jsonl").read_bytes() == before
    # it was killed, and its number is in the lock: it holds nothing
    assert str(pid) in (run / "lock").read_text()
    assert train(run, 9) == 0
    assert steps_of(run)[-1] == 9
    assert (run / "lock").read_text() == ""


def test_a_lock_of_another_host_is_refused_until_it_is_removed(run, capsys):
    (run / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    assert train(run, 9) == 2
    assert "process 1 on elsewhere" in said(capsys)
    (run / "lock").unlink()
    assert train(run, 9) == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "\0" * 9])
def test_a_lock_that_says_nothing_holds_nothing(content, tmp_path):
    (tmp_path / "lock").write_text(content)
    with locking.held(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "lock").read_text() == ""


def test_one_process_does_not_hold_a_folder_twice(tmp_path):
    with (
        locking.held(tmp_path),
        pytest.raises(ValueError, match=f"process {os.getpid()} on"),
        locking.held(tmp_path),
    ):
        pass


def test_where_a_file_system_has_no_locks_the_numbers_are_compared(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locking.fcntl, "lockf", lockf)
    with (
        holder(tmp_path) as pid,
        pytest.raises(ValueError, match=f"process {pid} on"),
        locking.held(tmp_path),
    ):
        pass
    with locking.held(tmp_path):  # it has ended
        pass
