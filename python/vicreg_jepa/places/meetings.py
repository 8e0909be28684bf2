"""Meetings over a network: torchft's lighthouse says who has come, and gloo exchanges tensors.

The lighthouse (torchft.coordination) hears a heartbeat of every place. A meeting begins when all
places that it hears have come, so a place that has ended is missed for the seconds until its
heartbeat is overdue, and never again. The process group is formed anew for each meeting, from the
store of the first member. If an exchange fails, because a place ends in the middle of it, no place
takes its outer step, and those that are left meet again with the same contributions.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vicreg_jepa.config import Places
from vicreg_jepa.places.agenda import Agenda, Member, PlacesError, Standing, agenda
from vicreg_jepa.places.outer import Shared

BEAT = 1.0  # seconds between heartbeats; a lighthouse misses a place after 5 seconds by default
CONNECT = 10.0  # seconds
ATTEMPTS = 5  # failed exchanges in a row that end the run
AGAIN = 0.5  # seconds between two looks of a place that waits for others to begin with


@dataclass(frozen=True)
class Result:
    """What a meeting has given this place. shared: taken if it joined. mean: of the contributions,
    if there were any. sent, received: bytes of the tensors that were given to the collectives and
    that came out of them.
    """

    agenda: Agenda
    history: str
    shared: Shared | None
    mean: Tensor | None
    sent: int
    received: int


class Meetings:
    """This place's connection to the others. Raises PlacesError if there is no lighthouse.

    label: the beginning of this place's name. say: is called with what a user should know.
    """

    def __init__(self, settings: Places, label: str, say: Callable[[str], None]) -> None:
        os.environ.setdefault("RUST_LOG", "warn")  # torchft would report every request
        try:
            from torchft.coordination import LighthouseClient
            from torchft.process_group import ProcessGroupGloo
        except ImportError as error:
            raise ImportError(
                f"places.meeting: needs torchft ({error}): pip install 'vicreg-kernels[places]'"
            ) from error
        self.settings, self.say = settings, say
        host = settings.host or socket.gethostname()
        # Sums are in the order of names, so labels that differ make a run repeatable.
        self.name = f"{label}-{host}-{uuid.uuid4().hex[:12]}"
        self.address = f"http://{settings.meeting}"
        try:
            self.lighthouse, self.pulse = (
                LighthouseClient(self.address, timedelta(seconds=CONNECT)) for _ in range(2)
            )
        except RuntimeError as error:
            raise PlacesError(
                f"places.meeting: no lighthouse at {settings.meeting}; torchft_lighthouse starts "
                f"one ({str(error).partition(';')[0]})"
            ) from None
        # Every place has a store, because the first member may be any of them.
        self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.at = f"{host}:{self.store.port}"
        self.group = ProcessGroupGloo(timeout=timedelta(seconds=settings.patience))
        self.sent = self.received = 0
        self.heard = time.monotonic()
        self.ended = threading.Event()
        self.heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def close(self) -> None:
        """End the heartbeat. Its thread may not return into an interpreter that is ending."""
        self.ended.set()
        if self.heart.ident is not None:
            self.heart.join()

    def hold(
        self, standing: Standing, shared: Callable[[], Shared], contribution: Callable[[], Tensor]
    ) -> Result:
        """Meet the other places. Waits until all places that the lighthouse hears have come.

        The waiting is done in another thread, so that a signal ends it. The first call begins the
        heartbeat: before it nobody may wait for this place.
        """
        if self.heart.ident is None:
            self.heart.start()
        outcome: list[Any] = []

        def wait() -> None:
            try:
                outcome.append(self._hold(standing, shared, contribution))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=wait, name="meeting", daemon=True)
        thread.start()
        thread.join()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def _hold(
        self, standing: Standing, shared: Callable[[], Shared], contribution: Callable[[], Tensor]
    ) -> Result:
        self.sent = self.received = 0
        own, given = shared(), contribution()
        for _ in range(ATTEMPTS):
            planned, key = self._assemble(standing)
            try:
                return self._exchange(planned, key, own, given)
            except (RuntimeError, TimeoutError) as error:
                last = str(error).partition("\n")[0]
                self.say(f"an exchange with {len(planned.members) - 1} places failed: {last}")
        raise PlacesError(f"places: {ATTEMPTS} exchanges have failed, the last one with: {last}")

    # ------------------------------------------------------------------------------ who is there

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            try:
                self.pulse.heartbeat(self.name, timedelta(seconds=CONNECT))
                self.heard = time.monotonic()
            except (RuntimeError, TimeoutError):
                continue  # `_quorum` says it if it lasts

    def _quorum(self, standing: Standing) -> tuple[list[Member], str]:
        while True:
            try:
                quorum = self.lighthouse.quorum(
                    replica_id=self.name, timeout=timedelta(hours=1), address="",
                    store_address=self.at, step=standing.round + 1, world_size=1,
                    shrink_only=False, data=standing.described(),
                )  # fmt: skip
                break
            except TimeoutError:
                continue
            except RuntimeError as error:
                silent = time.monotonic() - self.heard
                if silent > self.settings.patience:
                    raise PlacesError(
                        f"places.meeting: the lighthouse at {self.settings.meeting} has not "
                        f"answered for {silent:.0f} s; the same command resumes the run"
                    ) from error
                time.sleep(BEAT)
        members = [
            Member(p.replica_id, p.store_address, Standing(**p.data)) for p in quorum.participants
        ]
        created = f"{quorum.created.seconds}.{quorum.created.nanos:09d}"
        return members, f"{quorum.quorum_id}-{created}"

    def _assemble(self, standing: Standing) -> tuple[Agenda, str]:
        """What is to be done, and a name of this meeting that all members know."""
        waiting = False
        while True:
            present, key = self._quorum(standing)
            planned = agenda(present, self.settings.start)
            if self.name in planned.refused:
                raise PlacesError(planned.refused[self.name])
            if not planned.waits:
                return planned, key
            if not waiting:
                self.say(f"{len(planned.members)} of {self.settings.start} places are here")
            waiting = True
            time.sleep(AGAIN)

    # ------------------------------------------------------------------------------ what is sent

    def _exchange(self, planned: Agenda, key: str, own: Shared, given: Tensor) -> Result:
        names = [member.name for member in planned.members]
        before = planned.source.standing.history
        history = key if planned.contributing or not before else before
        if len(names) > 1 and (planned.joining or planned.contributing):
            store = f"{planned.members[0].store}/vicreg_jepa/{key}"
            self.group.configure(store, self.name, names.index(self.name), len(names))
        taken = self._join(planned, names, own)
        mean = None
        if planned.contributing:
            contributes = any(m.name == self.name for m in planned.contributing)
            mean = given.clone() if contributes else torch.zeros_like(own.anchor)
            if len(names) > 1:
                self._sum(mean)
                mean /= len(planned.contributing)
        if len(names) > 1 and (planned.joining or planned.contributing):
            # A place that has everything must not take its step while another one lacks a part.
            self._sum(torch.ones(1))
        return Result(planned, history, taken, mean, self.sent, self.received)

    def _join(self, planned: Agenda, names: list[str], own: Shared) -> Shared | None:
        """Send the shared weights to those who join; return them to one of these."""
        source = names.index(planned.source.name)
        if self.name == planned.source.name:
            for member in planned.joining:
                for tensor in filter(torch.Tensor.numel, own):
                    self.group.send([tensor], names.index(member.name), 0).wait()
                    self.sent += tensor.nbytes
        if all(member.name != self.name for member in planned.joining):
            return None
        taken = Shared(*map(torch.empty_like, own))
        for tensor in filter(torch.Tensor.numel, taken):
            self.group.recv([tensor], source, 0).wait()
            self.received += tensor.nbytes
        return taken

    def _sum(self, tensor: Tensor) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM
        self.group.allreduce([tensor], options).wait()
        self.sent += tensor.nbytes
        self.received += tensor.nbytes
