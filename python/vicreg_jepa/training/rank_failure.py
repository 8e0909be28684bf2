"""What a run of many processes says when one of them ends: which, how, and how the run goes on.

torchrun ends the others with SIGTERM, unless their next collective has failed already. Neither says
why; and the main thread may be waiting for a device that never answers. So a thread of each process
watches the other ones of its host and its own SIGTERM, and the first that knows speaks for all.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from vicreg_jepa.training import checkpoint

# Seconds: for the end of another process to be seen after a collective has failed; for the other
# ranks to say that they are alive; for the main thread to leave after SIGTERM; for SIGTERM to come.
SEEN, ALIVE, LEAVE, TOLD = 3.0, 6.0, 3.0, 10.0
FAILED = 1


class Stopped(Exception):
    """SIGTERM, in the main thread."""


class Watch:
    """On every rank, from its making to `close`. folder: of the run's checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank, self.ranks = folder, dist.get_rank(), dist.get_world_size()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"vicreg_jepa/ranks/{attempt}", store)
        self.how: dict[int, str] = {}  # of the ranks seen to end
        self.changed, self.lock, self.spoken = threading.Condition(), threading.Lock(), False
        self.told, self.leaving = threading.Event(), False  # told: by SIGTERM
        self.pids = self._exchange()
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        self.before = signal.signal(signal.SIGTERM, self._stop), signal.set_wakeup_fd(self.write)
        self.thread = threading.Thread(target=self._watch, name="ending", daemon=True)
        self.thread.start()

    def close(self) -> None:
        handler, wakeup = self.before
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        os.write(self.write, b"\0")
        self.thread.join()
        os.close(self.read)
        os.close(self.write)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self.leaving:
            raise Stopped

    def _exchange(self) -> dict[int, int]:
        """The processes of the other ranks on this host."""
        host = socket.gethostname()
        self.store.set(f"process/{self.rank}", f"{os.getpid()} {host}")
        found = {}
        for rank in range(self.ranks):
            pid, _, where = self.store.get(f"process/{rank}").decode().partition(" ")
            if where == host and rank != self.rank:
                found[rank] = int(pid)
        return found

    # -------------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        events = select.poll()
        events.register(self.read, select.POLLIN)
        ranks = {}
        for rank, pid in self.pids.items():
            # Not before Linux 5.3, nor elsewhere: then SIGTERM alone says that one has ended.
            with contextlib.suppress(AttributeError, OSError):
                handle = os.pidfd_open(pid)
                ranks[handle] = rank
                events.register(handle, select.POLLIN)
        try:
            while True:
                for handle, _ in events.poll():
                    if handle in ranks:
                        events.unregister(handle)
                        with self.changed:
                            self.how[ranks[handle]] = _how(self.pids[ranks[handle]])
                            self.changed.notify_all()
                    else:
                        told = os.read(self.read, 64)
                        if b"\0" in told:
                            return
                        if signal.SIGTERM in told:
                            self._end()
        finally:
            for handle in ranks:
                os.close(handle)

    def _end(self) -> None:
        """The main thread has the time to close what it has open, and to speak; if it can."""
        self.told.set()
        time.sleep(LEAVE)
        self.speak()
        os._exit(FAILED)

    # ------------------------------------------------------------------------------ what is said

    def left(self, error: Exception) -> None:
        """In the main thread, with what ended it: returns if that is this rank's own failure, which
        the others are told of; ends the process if it follows from another's end, or SIGTERM.
        """
        self.leaving = True
        if not isinstance(error, Stopped):
            others = isinstance(error, RuntimeError) and self._others_ended()
            if not others:
                with contextlib.suppress(RuntimeError):
                    line = (str(error).splitlines() or [""])[0]
                    self.store.set(f"failed/{self.rank}", f"{type(error).__name__}: {line}")
                self.spoken = True  # its own traceback says it
                return
        self.speak()
        sys.stdout.flush()
        self.told.wait(TOLD)  # torchrun then counts the rank that ended, not this one, as failed
        os._exit(FAILED)

    def _others_ended(self) -> bool:
        if self._failed():
            return True
        with self.changed:
            return bool(self.changed.wait_for(lambda: self.how, timeout=SEEN))

    def speak(self) -> None:
        """Once, by one of the ranks that are left."""
        with self.lock:
            if self.spoken:
                return
            self.spoken = True
            with contextlib.suppress(RuntimeError):
                self.store.set(f"alive/{self.rank}", "")
            failed, ended = self._failed(), self._ended()
            first = True
            with contextlib.suppress(RuntimeError):
                first = self.store.add("spoken", 1) == 1
            if first:
                print(self.message(failed, ended), file=sys.stderr, flush=True)

    def _failed(self) -> dict[int, str]:
        found = {}
        with contextlib.suppress(RuntimeError):
            for rank in range(self.ranks):
                if rank != self.rank and self.store.check([f"failed/{rank}"]):
                    found[rank] = f"failed: {self.store.get(f'failed/{rank}').decode()}"
        return found

    def _ended(self) -> dict[int, str]:
        """Those seen to end; after SIGTERM, which all get, also those that do not answer."""
        with self.changed:
            found = dict(self.how)
        if found or not self.told.is_set():
            return found
        until = time.monotonic() + ALIVE
        for rank in set(range(self.ranks)) - {self.rank}:
            left = max(timedelta(seconds=until - time.monotonic()), timedelta(milliseconds=1))
            try:
                self.store.wait([f"alive/{rank}"], left)
            except RuntimeError:
                found[rank] = "ended: it does not answer"
        return found

    def message(self, failed: dict[int, str], ended: dict[int, str]) -> str:
        lines = [
            f"vicreg-jepa: rank {rank} of {self.ranks}{self._process(rank)} {how}"
            for rank, how in sorted((failed or ended).items())
        ]
        lines = lines or ["vicreg-jepa: the run was stopped by SIGTERM"]
        path = checkpoint.newest(self.folder)
        if path is None:
            lines.append("It has no checkpoint yet; the same command starts it again:")
        else:
            step = int(path.name.removeprefix("step_"))
            lines.append(f"The run goes on from step {step} ({path}) with the same command:")
        return "\n".join([*lines, f"    {command()}"])

    def _process(self, rank: int) -> str:
        return f" (process {self.pids[rank]})" if rank in self.pids else ""


def _how(pid: int) -> str:
    """Of a process that has just ended, before torchrun has asked: /proc then still knows."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = int(fields[-1]) if fields[0] == "Z" else None
    except (OSError, ValueError, IndexError):
        status = None
    if status is None:
        return "ended: torchrun's report says how"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended with exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was killed by signal {-code} ({names.get(-code, 'real-time')})"


def command() -> str:
    """What started this run, as torchrun takes it."""
    words = [word for word in sys.orig_argv[1:] if word != "-u"]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // max(1, local)
    launch = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else [])]
    return shlex.join([*launch, "--nproc-per-node", str(local), *words])


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Around the training of one rank among many; folder: of the run's checkpoints."""
    watch = Watch(folder)
    try:
        yield
    except Exception as error:
        watch.left(error)
        raise
    finally:
        watch.close()
