"""How a run ends: what it keeps, and one line that says how to resume."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from vicreg_jepa import cli, config
from vicreg_jepa.data import batches, image_files, sources
from vicreg_jepa.files import output
from vicreg_jepa.training.run import restore
from vicreg_jepa.training.run import train as train_settings
from vicreg_jepa.training.trainer import Trainer

from tests.trainer.runs import SMALL, a_run, checkpoint_of, column, said, steps_of, train, trained
from tests.trainer.test_pictures import folder as pictures_of


@pytest.fixture
def run(tmp_path, capsys) -> Path:
    return a_run(tmp_path, capsys)


# ------------------------------------------------------------------------------ how it ends


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_in_one_line(number, code, tmp_path, capsys, monkeypatch):
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
    assert "vicreg-jepa: stopped by " + number.name in lines[-1]
    assert f"resumes at step 3 ({checkpoint_of(tmp_path / 'run', 3)})" in lines[-1]
    assert signal.getsignal(number) is before
    assert train(tmp_path / "run") == 0
    assert column(tmp_path / "run", "loss") == column(trained(), "loss")


@pytest.mark.parametrize("when", ["waiting", "before"])
def test_a_signal_outside_of_a_step(when, tmp_path, capsys, monkeypatch):
    """While it waits for data it saves what it has; before the first step there is nothing."""
    unhurried = batches.ImageSource.batches

    def slow(self, start, share):
        if when == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        for number, batch in enumerate(unhurried(self, start, share)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(batches.ImageSource, "batches", slow)
    assert train(tmp_path / "run", 60, "training.save_every=50") == 143
    line = said(capsys).splitlines()[-1]
    if when == "waiting":
        assert "resumes at step 3" in line
        assert restore(tmp_path / "run")[2] == 3
    else:
        assert "no checkpoint yet" in line


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path):
    made = config.load("vicreg_digits", [*SMALL, "training.steps=2"])
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(train_settings(made, tmp_path / "run")))
    thread.start()
    thread.join()
    assert codes == [2]


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
    assert line.startswith(f"vicreg-jepa: {run}"), line
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
    assert line.startswith(f"vicreg-jepa: images: {root}/a/3.png is not an image Pillow reads")


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
    stored = image_files.stored("x", Dying(), 8)
    monkeypatch.setattr(sources, "images", lambda settings: (stored, stored))
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


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory.\nand more"), MemoryError()]
)
def test_too_little_memory_is_one_line(error, tmp_path, capsys, monkeypatch):
    def take(*_):
        raise error

    monkeypatch.setattr(Trainer, "take", take)
    assert train(tmp_path / "run") == 2
    line = said(capsys).splitlines()[-1]
    assert re.match("vicreg-jepa: .*out of memory.*take a smaller training.batch, or larger", line)


def test_a_fault_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    def take(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "take", take)
    with pytest.raises(RuntimeError, match="a bug"):
        train(tmp_path / "run")
