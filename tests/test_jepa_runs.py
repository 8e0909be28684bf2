"""A run's folder: nothing twice in its log, one run at a time, an end that says how to go on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from jepa import checkpoint, cli, config, launch, locking, output, source, stored
from jepa.trainer import Trainer
from PIL import Image
from test_jepa_pictures import folder as pictures_of

SMALL = ["training.batch=16", "model.dim=8", "model.expander=[8, 16]", "training.save_every=2"]
SMALL += ["training.log_every=2"]


def train(folder: Path, steps: int = 6, *words: str) -> int:
    given = config.layered([*SMALL, f"training.steps={steps}"], words)
    return cli.main(["train", "vicreg_digits", *given, "--output", str(folder)])


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train(folder) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, capsys) -> Path:
    """Of six steps, with checkpoints of steps 4 and 6."""
    capsys.readouterr()
    return Path(shutil.copytree(trained, tmp_path / "run"))


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


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
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("loss")] == list(range(1, 8))


# ------------------------------------------------------------------------------ checkpoints


def edited(path: Path, **changes) -> None:
    found = json.loads(path.read_text())
    found.update(changes)
    path.write_text(json.dumps(found))


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
    for format in ("jepa-checkpoint/1", "jepa-checkpoint/99"):
        state = checkpoint_of(run, 6) / "state.json"
        found = json.loads(state.read_text())
        found.pop("checksum", None)
        found["format"] = format
        state.write_text(json.dumps(found if format.endswith("1") else checkpoint.sealed(found)))
        assert train(run, 8) == 2
        assert f"has format '{format}', takes 'jepa-checkpoint/2'" in said(capsys)


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


KINDS = ("cut", "flipped", "no tensors", "no state", "half a state", "deep", "a file", "edited")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(kind, run, tmp_path, capsys):
    whole = column(run, "loss")
    damage(kind, checkpoint_of(run, 6))
    assert launch.restore(run)[2] == 4
    assert "step_00000006" in said(capsys)
    assert train(run) == 0
    text = said(capsys)
    assert "step_00000006" in text
    assert "going on from step 4" in text
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
from jepa import locking
with locking.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
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


# ------------------------------------------------------------------------------ how it ends


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_in_one_line(number, code, trained, tmp_path, capsys, monkeypatch):
    """In the middle of a step: the step is finished and kept."""
    take, before = Trainer.take, signal.getsignal(number)

    def told(self, batch):
        if self.step == 2:
            os.kill(os.getpid(), number)
        return take(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "take", told)
        assert train(tmp_path / "run") == code
    lines = said(capsys).splitlines()
    assert "jepa: stopped by " + number.name in lines[-1]
    assert f"goes on from step 3 ({checkpoint_of(tmp_path / 'run', 3)})" in lines[-1]
    assert signal.getsignal(number) is before
    assert train(tmp_path / "run") == 0
    assert column(tmp_path / "run", "loss") == column(trained, "loss")


@pytest.mark.parametrize("when", ["waiting", "before"])
def test_a_signal_outside_of_a_step(when, tmp_path, capsys, monkeypatch):
    """While it waits for data it saves what it has; before the first step there is nothing."""
    batches = source.ImageSource.batches

    def slow(self, start, share):
        if when == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        for number, batch in enumerate(batches(self, start, share)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(source.ImageSource, "batches", slow)
    assert train(tmp_path / "run", 60, "training.save_every=50") == 143
    line = said(capsys).splitlines()[-1]
    if when == "waiting":
        assert "goes on from step 3" in line
        assert launch.restore(tmp_path / "run")[2] == 3
    else:
        assert "no checkpoint yet" in line


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path):
    made = config.load("vicreg_digits", [*SMALL, "training.steps=2"])
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(launch.train(made, tmp_path / "run")))
    thread.start()
    thread.join()
    assert found == [2]


@contextlib.contextmanager
def files_of(most: int) -> Iterator[None]:
    """No file of this process grows beyond `most` bytes: what a full disk does to it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("most", [0, 10, 1000, 10000])
def test_a_full_disk_ends_in_one_line(most, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, 2) == 0
    kept = {path: path.read_bytes() for path in checkpoint_of(run, 2).iterdir()}
    capsys.readouterr()
    with files_of(most):
        assert train(run, 8) == 2
    line = said(capsys).splitlines()[-1]
    assert line.startswith(f"jepa: {run}"), line
    assert "cannot be written (File too large)" in line
    assert {path: path.read_bytes() for path in checkpoint_of(run, 2).iterdir()} == kept
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert train(run, 4) == 0
    assert steps_of(run) == [1, 2, 3, 4]


def test_no_space_is_said_to_be_no_space(tmp_path):
    """What the kernel says of /dev/full, a device that is always so."""
    path = tmp_path / "full"
    path.symlink_to("/dev/full")
    named = r"full: cannot be written \(No space left on device\): free some space"
    with (
        pytest.raises(output.OutputError, match=named),
        output.writing(path),
        path.open("w") as file,
    ):
        file.write("x")
    from safetensors.torch import save_file

    with pytest.raises(output.OutputError, match="cannot be written"), output.writing(path):
        save_file({"x": torch.zeros(9)}, tmp_path / "nowhere" / "file")


@pytest.mark.parametrize("where", ["run", "run/checkpoints", "run/metrics.jsonl", "a/run"])
def test_a_file_where_a_folder_is_meant_and_the_reverse(where, tmp_path, capsys):
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    if where.endswith("jsonl"):
        path.mkdir()
    elif where == "a/run":
        path.parent.rmdir()
        path.parent.write_text("a file")
    else:
        path.write_text("a file")
    assert train(tmp_path / ("a/run" if where == "a/run" else "run"), 2) == 2
    line = said(capsys).splitlines()[-1]
    assert "another --output" in line
    assert str(tmp_path) in line


def test_a_folder_that_is_read_only(tmp_path, capsys, monkeypatch):
    """Root writes anywhere, so the refusal is the kernel's of a read-only file system."""

    def refused(*_, **__):
        raise OSError(30, "Read-only file system", str(tmp_path / "run"))

    monkeypatch.setattr(Path, "mkdir", refused)
    assert train(tmp_path / "run", 2) == 2
    assert "Read-only file system): make it writable, or give another --output" in said(capsys)


def test_a_workers_error_is_one_line(tmp_path, capsys):
    root = pictures_of(tmp_path / "pictures", each=8)
    (root / "a" / "3.png").write_bytes(b"no picture")
    words = ["data.kind=images", f"data.path={root}", "data.workers=1", "training.batch=12"]
    assert train(tmp_path / "run", 3, *words) == 2
    line = said(capsys).splitlines()[-1]
    assert line.startswith(f"jepa: images: {root}/a/3.png is not an image Pillow reads")


class Dying:
    """Pictures that end the process that reads them."""

    classes = ()

    def __len__(self) -> int:
        return 16

    def picture(self, number: int):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.new("RGB", (8, 8))

    def where(self, number: int) -> str:
        return "x"


def test_a_worker_that_is_killed_is_one_line(tmp_path, capsys, monkeypatch):
    found = stored.stored("x", Dying(), 8)
    monkeypatch.setattr(launch, "images", lambda settings: (found, found))
    assert train(tmp_path / "run", 3, "data.workers=1", "training.batch=4") == 2
    line = said(capsys).splitlines()[-1]
    assert re.search(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", line)
    assert "data.workers" in line


@pytest.mark.parametrize(
    "command", [["probe"], ["export", "OUT"], ["surprise"], ["train", "vicreg_digits", "--output"]]
)
@pytest.mark.parametrize("what", ["file", "empty", "missing", "loop"])
def test_runs_that_are_none(command, what, tmp_path, capsys):
    run = tmp_path / "x"
    if what == "file":
        run.write_bytes(b"")
    elif what == "empty":
        run.mkdir()
    elif what == "loop":
        run.symlink_to(run)
    if command[0] == "train":
        if what in ("empty", "missing"):
            return
        words = [*command, str(run)]
    else:
        words = [command[0], str(run), *(str(tmp_path / z) for z in command[1:])]
    assert cli.main(words) == 2
    assert str(run) in said(capsys)


def test_export_to_where_nothing_can_be_written(run, tmp_path, capsys):
    for target in (tmp_path / "no" / "x.safetensors", tmp_path):
        assert cli.main(["export", str(run), str(target)]) == 2
        assert f"{target}: cannot be written" in said(capsys)
