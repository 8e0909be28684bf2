"""Real meetings: torchft's lighthouse and gloo between threads of this process; in the thorough
tests, commands of which one is killed and comes back.
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
from vicreg_jepa.demo.places import free_port
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
        self.meetings = Meetings(
            config.load("vicreg_digits", words).places, str(seed), self.said.append
        )
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


SERVER = """
import sys, time
from torchft.coordination import LighthouseServer
server = LighthouseServer(bind=f"[::]:{sys.argv[1]}", min_replicas=1)
print("here", flush=True)
time.sleep(600)
"""


def started(*words: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        [sys.executable, "-u", *words], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.thorough
def test_a_lighthouse_that_ends_is_named_after_the_patience(monkeypatch):
    monkeypatch.setattr("vicreg_jepa.places.meetings.CONNECT", 2.0)
    port = free_port()
    server = started("-c", SERVER, str(port))
    try:
        assert "here" in server.stdout.readline()
        one = One(str(port), patience=3.0).meet()
        assert one.error is None
        assert one.round == 0
    finally:
        server.kill()
        server.wait()
    begun = time.monotonic()
    one.meet()
    assert isinstance(one.error, PlacesError)
    assert f"the lighthouse at localhost:{port} has not answered for" in str(one.error)
    assert time.monotonic() - begun < 30
    one.meetings.close()


@pytest.mark.thorough
def test_a_place_that_waits_for_others_can_be_stopped(lighthouse, tmp_path):
    run = started(
        "-m", "vicreg_jepa", "train", "vicreg_digits", "places.start=2", "places.host=localhost",
        f"places.meeting=localhost:{lighthouse}", "--output", str(tmp_path / "run"),
    )  # fmt: skip
    try:
        text = ""
        while "1 of 2 places are here" not in text:
            line = run.stdout.readline()
            assert line, text
            text += line
        run.send_signal(signal.SIGTERM)
        text += run.communicate(timeout=60)[0]
    finally:
        run.kill()
    assert run.returncode == 143, text
    assert "Traceback" not in text
    assert "vicreg-jepa: stopped by SIGTERM" in text


@pytest.mark.thorough
def test_a_place_that_is_killed_comes_back(tmp_path):
    """One of four is killed with SIGKILL: the others go on without it, it comes back and takes
    their weights, and all end with the same ones.
    """
    run = started(
        "-m", "vicreg_jepa.demo.places", "--ways", "killed", "--steps", "240", "--every", "10",
        "--seeds", "0", "--output", str(tmp_path), "training.batch=64", "training.save_every=20",
    )  # fmt: skip
    text = run.communicate(timeout=TIMEOUT)[0]
    folder = tmp_path / "seed_0"
    assert run.returncode == 0, text + (folder / "log.txt").read_text()
    final = [
        checkpoint.load(folder / f"killed_{k}" / "checkpoints" / "step_00000240")[0]
        for k in range(4)
    ]
    for name, z in final[0].items():
        if name.startswith(("method", "places")) and z.is_floating_point():
            assert all(torch.equal(z, other[name]) for other in final[1:]), name
    rows = [
        [
            json.loads(line)
            for line in (folder / f"killed_{k}" / "places.jsonl").read_text().splitlines()
        ]
        for k in range(4)
    ]
    assert {row["places"] for row in rows[0]} == {3, 4}
    assert rows[0][-1]["places"] == 4
    (joined,) = [row for row in rows[3] if row["joined"] and row["round"] > 0]
    assert joined["step"] == 10 * joined["round"] >= 160
    assert joined["contributed"] == 3
    steps = [row["step"] for row in rows[3]]
    assert joined["step"] - steps[rows[3].index(joined) - 1] >= 70  # it was away
