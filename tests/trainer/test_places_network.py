"""Real meetings: torchft's lighthouse and gloo between threads of this process, and, in the thorough
test, four commands of which one is killed and comes back.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from vicreg_jepa import config
from vicreg_jepa.places.agenda import NEW, PlacesError, Standing
from vicreg_jepa.places.meetings import Meetings, Result
from vicreg_jepa.places.outer import Shared
from vicreg_jepa.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300
coordination = pytest.importorskip("torchft.coordination", reason="needs torchft (extra `places`)")


@pytest.fixture
def lighthouse():
    server = coordination.LighthouseServer(
        bind="[::]:0", min_replicas=1, join_timeout_ms=60000, heartbeat_timeout_ms=1500
    )
    yield server.address().rpartition(":")[2]
    server.shutdown()


class One:
    """A place with weights of two elements, which come to `local` before each meeting."""

    def __init__(self, port: str, start: int = 1, patience: float = 20.0, seed: int = 0) -> None:
        words = [f"places.meeting=localhost:{port}", "places.host=localhost",
                 f"places.start={start}", f"places.patience={patience}"]  # fmt: skip
        self.said: list[str] = []
        self.meetings = Meetings(config.load("vicreg_digits", words).places, self.said.append)
        self.shared = Shared(torch.full((2,), seed + 1.0), torch.zeros(2), torch.tensor([seed]))
        self.round, self.history, self.local = NEW, "", torch.full((2,), float(seed))
        self.settings = {"method": "a"}
        self.result: Result | None = None
        self.error: BaseException | None = None

    def meet(self, due: bool = True) -> One:
        due = due and self.round != NEW
        standing = Standing(self.round, self.history, int(due), due, self.settings, str(id(self)))
        try:
            self.result = self.meetings.hold(standing, lambda: self.shared, self.local.clone)
        except BaseException as error:
            self.error = error
            return self
        if self.result.shared is not None:
            self.shared = self.result.shared
        self.round, self.history = self.result.agenda.round, self.result.history
        return self


def at_once(*places: One, joins: One | None = None) -> None:
    """All meet. joins: one that has come before the others, who do not wait for it."""
    threads = [threading.Thread(target=one.meet) for one in (joins, *places) if one]
    for thread in threads:
        thread.start()
        if joins is not None and thread is threads[0]:
            time.sleep(0.5)
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_places_begin_meet_leave_and_join(lighthouse):
    """Three places begin with the weights of one and exchange means; one leaves without a word, a
    new one takes its place; bytes are those of the tensors.
    """
    three = [One(lighthouse, start=3, seed=k) for k in range(3)]
    at_once(*three)
    assert [one.round for one in three] == [0, 0, 0]
    first = min(three, key=lambda one: one.meetings.name)
    for one in three:
        assert torch.equal(one.shared.anchor, first.shared.anchor)
        assert torch.equal(one.shared.counters, first.shared.counters)
        assert one.result.mean is None
    state = 2 * 4 + 2 * 4 + 8
    assert first.result.sent == 2 * state + 4
    assert {one.result.received for one in three} == {4, state + 4}

    at_once(*three)
    for one in three:
        assert torch.equal(one.result.mean, torch.full((2,), 1.0))  # of 0, 1 and 2
        assert (one.round, one.history) == (1, three[0].history)
        assert (one.result.sent, one.result.received) == (12, 12)

    three[2].meetings.close()  # the lighthouse misses its heartbeat
    at_once(*three[:2])
    assert all(torch.equal(one.result.mean, torch.full((2,), 0.5)) for one in three[:2])

    new = One(lighthouse, seed=7)
    at_once(*three[:2], joins=new)
    assert torch.equal(new.result.mean, torch.full((2,), 0.5))  # it contributes nothing yet
    assert torch.equal(new.shared.anchor, three[0].shared.anchor)
    assert {one.round for one in (*three[:2], new)} == {3}
    at_once(*three[:2], new)
    assert torch.equal(new.result.mean, torch.full((2,), 8 / 3))
    for one in (*three[:2], new):
        one.meetings.close()


def test_an_exchange_that_breaks_is_repeated_by_those_who_are_left(lighthouse):
    """The second place comes to the meeting and ends before it sends anything."""
    two = [One(lighthouse, start=2, seed=k, patience=2.0) for k in range(2)]
    at_once(*two)
    one, other = two

    def ends(*_) -> None:
        other.meetings.close()
        raise KeyboardInterrupt

    other.meetings._exchange = ends
    at_once(*two)
    assert isinstance(other.error, KeyboardInterrupt)
    assert one.error is None
    assert torch.equal(one.result.mean, one.local)
    assert any("an exchange with 1 places failed" in text for text in one.said)
    one.meetings.close()


def test_other_settings_and_no_lighthouse(lighthouse, monkeypatch):
    monkeypatch.setattr("vicreg_jepa.places.meetings.CONNECT", 0.5)
    two = [One(lighthouse, start=1, seed=k) for k in range(2)]
    two[0].meet()
    two[1].settings = {"method": "b"}
    at_once(two[0], joins=two[1])
    assert isinstance(two[1].error, PlacesError)
    assert str(two[1].error) == "method: got b, takes that of the other places, a"
    assert two[0].error is None
    assert two[0].round == 1
    for one in two:
        one.meetings.close()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        with pytest.raises(PlacesError, match=r"places.meeting: no lighthouse at localhost:"):
            One(str(free.getsockname()[1]))


WORDS = ["training.batch=16", "model.dim=8", "model.expander=[8,16]", "training.save_every=20",
         "training.steps=300", "training.log_every=100", "places.every=10",
         "places.start=3"]  # fmt: skip


def command(port: str, folder: Path, seed: int) -> subprocess.Popen:
    words = [f"places.meeting=localhost:{port}", "places.host=localhost", f"seed={seed}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    )
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "vicreg_jepa", "train", "vicreg_digits", *WORDS, *words,
             "--output", str(folder)], env=environment, stdout=log, stderr=log,
        )  # fmt: skip


def rows(folder: Path) -> list[dict]:
    path = folder / "places.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.thorough
def test_a_place_that_is_killed_comes_back(lighthouse, tmp_path):
    """kill -9 of one of three; the others go on without it; it resumes, takes their weights, and all
    end with the same ones. Another is told to stop, saves, and resumes.
    """
    folders = [tmp_path / str(k) for k in range(3)]
    runs = [command(lighthouse, folder, k) for k, folder in enumerate(folders)]
    until = time.monotonic() + TIMEOUT

    def wait(reached) -> None:
        while not reached(rows(folders[0])):
            assert time.monotonic() < until
            assert runs[0].poll() is None, (tmp_path / "0.log").read_text()
            time.sleep(0.02)

    try:
        wait(lambda row: row and row[-1]["round"] >= 5)
        runs[2].send_signal(signal.SIGKILL)
        runs[2].wait()
        wait(lambda row: row[-1]["places"] == 2)
        runs[2] = command(lighthouse, folders[2], 2)
        wait(lambda row: row[-1]["places"] == 3)
        runs[1].send_signal(signal.SIGTERM)
        assert runs[1].wait(TIMEOUT) == 143, (tmp_path / "1.log").read_text()
        runs[1] = command(lighthouse, folders[1], 1)
        for run in runs:
            assert run.wait(TIMEOUT) == 0, [p.read_text() for p in tmp_path.glob("*.log")]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    weights = [checkpoint.load(f / "checkpoints" / "step_00000300")[0] for f in folders]
    for name in weights[0]:
        if name.startswith(("method", "places")) and weights[0][name].is_floating_point():
            assert torch.equal(weights[0][name], weights[1][name]), name
            assert torch.equal(weights[0][name], weights[2][name]), name
    (joined,) = [row for row in rows(folders[2])[1:] if row["joined"]]
    assert joined["step"] == 10 * joined["round"]
    assert {row["places"] for row in rows(folders[0])} >= {2, 3}
