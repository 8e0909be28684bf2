"""When one rank of a torchrun job dies, report which one, how, and the command that resumes the
run; when the job is told to stop, let all ranks save first.

torchrun ends the other ranks with SIGTERM, unless their next collective has failed already. Neither
says why, and the main thread may be waiting for a device that never answers. So a thread of each
process watches the other processes of its host and its own signals; the first rank to detect a
failure prints the message for all. While every rank is alive, a signal only asks for a stop: the
trainer's ranks agree on it at the end of a step and save (trainer.py).
"""

from __future__ import annotations

import contextlib
import math
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
from vicreg_jepa.training.stopping import SIGNALS, Stop, Stopped

# All in seconds. How long a rank whose collective failed waits for another process to end.
PEER_EXIT_TIMEOUT = 3.0
# After a signal, how long the other ranks have to answer that they are alive.
ALIVE_TIMEOUT = 6.0
# After a signal, how long the ranks have to finish their step and save: torchrun kills them 30
# seconds after it has sent the signal.
SAVE_TIMEOUT = 25.0
# After a signal and the end of another rank, without which the main thread cannot continue, how
# long the main thread has to leave by itself.
LEAVE_TIMEOUT = 3.0
# After a failure, how long a rank waits for torchrun's signal, so that torchrun counts the rank
# that ended first as the one that failed.
SIGNAL_TIMEOUT = 10.0
FAILED = 1


class RankMonitor:
    """Runs on every rank, from its creation to `close`.

    folder: the run's checkpoints. stop: gets the signals.
    """

    def __init__(self, folder: Path, stop: Stop) -> None:
        self.folder, self.rank, self.ranks = folder, dist.get_rank(), dist.get_world_size()
        self.stop = stop
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"vicreg_jepa/ranks/{attempt}", store)
        self.exit_reason: dict[int, str] = {}  # of the ranks that have ended
        self.changed, self.lock, self.reported = threading.Condition(), threading.Lock(), False
        self.signal_received = threading.Event()
        self.pids = self._exchange()
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        self.handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        self.wakeup = signal.set_wakeup_fd(self.write)
        self.thread = threading.Thread(target=self._watch, name="rank monitor", daemon=True)
        self.thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        os.write(self.write, b"\0")
        self.thread.join()
        os.close(self.read)
        os.close(self.write)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop.told is None:
            self.stop.told = number

    def _exchange(self) -> dict[int, int]:
        """The processes of the other ranks on this host."""
        host = socket.gethostname()
        self.store.set(f"process/{self.rank}", f"{os.getpid()} {host}")
        pids = {}
        for rank in range(self.ranks):
            pid, _, where = self.store.get(f"process/{rank}").decode().partition(" ")
            if where == host and rank != self.rank:
                pids[rank] = int(pid)
        return pids

    # -------------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        events = select.poll()
        events.register(self.read, select.POLLIN)
        ranks = {}
        for rank, pid in self.pids.items():
            # Needs Linux 5.3 or later; without it only SIGTERM shows that another rank has ended.
            with contextlib.suppress(AttributeError, OSError):
                handle = os.pidfd_open(pid)
                ranks[handle] = rank
                events.register(handle, select.POLLIN)
        until = math.inf
        try:
            while time.monotonic() < until:
                left = None if until == math.inf else 1000 * max(0.0, until - time.monotonic())
                for handle, _ in events.poll(left):
                    if handle in ranks:
                        events.unregister(handle)
                        with self.changed:
                            rank = ranks[handle]
                            self.exit_reason[rank] = _exit_reason(self.pids[rank])
                            self.changed.notify_all()
                    else:
                        received = os.read(self.read, 64)
                        if b"\0" in received:
                            return
                        if any(number in received for number in SIGNALS):
                            self.signal_received.set()
                if self.signal_received.is_set():
                    wait = LEAVE_TIMEOUT if self.exit_reason else SAVE_TIMEOUT
                    until = min(until, time.monotonic() + wait)
        finally:
            for handle in ranks:
                os.close(handle)
        # The main thread has had the time to save, or to close what it has open and to report.
        self.report_once()
        os._exit(FAILED)

    # ------------------------------------------------------------------------------ what is said

    def on_exception(self, error: Exception) -> None:
        """Called in the main thread with the exception that ended it. If the failure is this rank's
        own, tells the other ranks and returns; if it follows from another rank's end, ends the
        process.
        """
        if not (isinstance(error, RuntimeError) and self._others_ended()):
            with contextlib.suppress(RuntimeError):
                line = (str(error).splitlines() or [""])[0]
                self.store.set(f"failed/{self.rank}", f"{type(error).__name__}: {line}")
            self.reported = True  # the traceback reports it
            return
        self.report_once()
        sys.stdout.flush()
        self.signal_received.wait(SIGNAL_TIMEOUT)
        os._exit(FAILED)

    def on_stop(self, stopped: Stopped) -> None:
        """Called in the main thread of every rank after all have saved: rank 0 prints one line.

        No rank ends before that line, because torchrun ends all ranks when it sees one end.
        """
        self.reported = True
        if self.rank == 0:
            text = f"vicreg-jepa: {stopped}{how_to_resume(self.folder)}"
            print(text, file=sys.stderr, flush=True)
        dist.barrier()

    def _others_ended(self) -> bool:
        if self._failed():
            return True
        with self.changed:
            return bool(self.changed.wait_for(lambda: self.exit_reason, timeout=PEER_EXIT_TIMEOUT))

    def report_once(self) -> None:
        """Let one of the remaining ranks print the message."""
        with self.lock:
            if self.reported:
                return
            self.reported = True
            with contextlib.suppress(RuntimeError):
                self.store.set(f"alive/{self.rank}", "")
            failed, ended = self._failed(), self._ended()
            first = True
            with contextlib.suppress(RuntimeError):
                first = self.store.add("reported", 1) == 1
            if first:
                print(self.message(failed, ended), file=sys.stderr, flush=True)

    def _failed(self) -> dict[int, str]:
        reasons = {}
        with contextlib.suppress(RuntimeError):
            for rank in range(self.ranks):
                if rank != self.rank and self.store.check([f"failed/{rank}"]):
                    reasons[rank] = f"failed: {self.store.get(f'failed/{rank}').decode()}"
        return reasons

    def _ended(self) -> dict[int, str]:
        """The ranks that have ended; after SIGTERM, which all ranks get, also those that do not
        answer.
        """
        with self.changed:
            reasons = dict(self.exit_reason)
        if reasons or not self.signal_received.is_set():
            return reasons
        until = time.monotonic() + ALIVE_TIMEOUT
        for rank in set(range(self.ranks)) - {self.rank}:
            left = max(timedelta(seconds=until - time.monotonic()), timedelta(milliseconds=1))
            try:
                self.store.wait([f"alive/{rank}"], left)
            except RuntimeError:
                reasons[rank] = "ended: it does not answer"
        return reasons

    def message(self, failed: dict[int, str], ended: dict[int, str]) -> str:
        lines = [
            f"vicreg-jepa: rank {rank} of {self.ranks}{self._process(rank)} {how}"
            for rank, how in sorted((failed or ended).items())
        ]
        lines = lines or [
            f"vicreg-jepa: stopped by a signal, not saved within {SAVE_TIMEOUT:.0f} s"
        ]
        path = checkpoint.newest(self.folder)
        if path is None:
            lines.append("It has no checkpoint yet; the same command starts it again:")
        else:
            step = int(path.name.removeprefix("step_"))
            lines.append(f"The same command resumes at step {step} ({path}):")
        return "\n".join([*lines, f"    {command()}"])

    def _process(self, rank: int) -> str:
        return f" (process {self.pids[rank]})" if rank in self.pids else ""


def _exit_reason(pid: int) -> str:
    """Read from /proc how a process has ended; the entry exists until torchrun collects the
    process.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = int(fields[-1]) if fields[0] == "Z" else None
    except (OSError, ValueError, IndexError):
        status = None
    if status is None:
        return "ended: see torchrun's report"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended with exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was killed by signal {-code} ({names.get(-code, 'real-time')})"


def command() -> str:
    """The torchrun command that started this run."""
    words = [word for word in sys.orig_argv[1:] if word != "-u"]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // max(1, local)
    launch = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else [])]
    return shlex.join([*launch, "--nproc-per-node", str(local), *words])


def how_to_resume(folder: Path) -> str:
    """The text after "stopped by ..."; folder: the run's checkpoints."""
    path = checkpoint.newest(folder)
    if path is None:
        return "; it has no checkpoint yet, the same command starts it again"
    step = int(path.name.removeprefix("step_"))
    return f"; the same command resumes at step {step} ({path})"


@contextlib.contextmanager
def watched(folder: Path, stop: Stop) -> Iterator[None]:
    """The context of the training on one of many ranks; folder: the run's checkpoints."""
    monitor = RankMonitor(folder, stop)
    try:
        yield
    except Exception as error:
        monitor.on_exception(error)
        raise
    except Stopped as stopped:
        monitor.on_stop(stopped)
        raise SystemExit(stopped.code) from None
    finally:
        monitor.close()
