"""A pytest plugin: which tests a process of `make gpu` runs, and what became of each.

    python3 -m pytest -p bench.gpu_select --gpu-list tests.json tests
    python3 -m pytest -p bench.gpu_select --gpu-tests some.json --gpu-records one.jsonl tests

Every test has exactly one part (`part_of`), so that no test is lost between the parts. some.json is
a list of the node ids that a process runs, all without it. The records are written line by line as
tests begin and end: those of a process that dies name the test it died in. A process that is
started again with the same records goes on with the tests that have none.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_records import finished

# Tests that need most of the GPU's memory: past 2^31 elements, those that count peaks, and SIGReg's
# real shapes, whose float64 reference holds every angle.
MEMORY = re.compile(r"two_to_the_31|far_offsets|peak_memory|sigreg/test_gpu\.py::test_real_shapes")
# After one of these every later call of the process fails too.
POISONED = re.compile(
    r"CUDA error: (?!out of memory)|CUBLAS_STATUS_EXECUTION_FAILED"
    r"|Triton Error \[CUDA\]: (an illegal|unspecified|misaligned|device-side)"
)
# pytest captures the file descriptor 2 from later on.
STDERR = os.dup(2)


def part_of(item: pytest.Item) -> str:
    """One of PARTS: memory-hungry tests, then those with triton in their name, then all others."""
    if item.get_closest_marker("gpu_memory") or MEMORY.search(item.nodeid.split("[")[0]):
        return "memory"
    return "triton" if "triton" in item.nodeid else "cuda"


def chosen(item: pytest.Item, device: str) -> bool:
    """On a GPU the tests marked gpu. On the CPU, where a run is rehearsed, what stands in for them:
    the tests of the fused backends on the CPU, and Triton's kernels in its interpreter.
    """
    marked = item.get_closest_marker("gpu") is not None
    if device == "cuda":
        return marked
    if marked or item.get_closest_marker("thorough") is not None:
        return False
    call = getattr(item, "callspec", None)
    backend = call and call.params.get("fused")
    interpreted = item.path.name.endswith("_triton.py") and "_audit_" not in item.path.name
    return bool(backend) or interpreted or item.path.name.startswith("test_rehearsed")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--gpu-device", default="cuda", help="cpu: what stands in for a GPU")
    group.addoption("--gpu-tests", help="a file with the node ids of the tests to run")
    group.addoption("--gpu-word", default="", help="only tests whose name has this pattern")
    group.addoption("--gpu-list", help="write the tests and their parts to this file, run none")
    group.addoption("--gpu-records", help="write what becomes of each test to this file")
    group.addoption("--gpu-limit", type=float, default=0.0, help="seconds a test")
    group.addoption("--gpu-fraction", type=float, default=1.0, help="of the GPU's memory")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu_memory: needs most of a GPU's memory, runs alone")
    config.pluginmanager.register(Recorder(config), "gpu recorder")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted, records = config.getoption("gpu_tests"), config.getoption("gpu_records")
    only = set(json.loads(Path(wanted).read_text())) if wanted else None
    word, device = re.compile(config.getoption("gpu_word")), config.getoption("gpu_device")
    done = finished(Path(records)) if records else set()
    keep = [
        item
        for item in items
        if chosen(item, device)
        and (only is None or item.nodeid in only)
        and word.search(item.name)
        and item.nodeid not in done
    ]
    kept = set(keep)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = keep
    if config.getoption("gpu_list"):
        listed = {item.nodeid: part_of(item) for item in items}
        Path(config.getoption("gpu_list")).write_text(json.dumps(listed))
        items[:] = []


def reason_of(report: Any) -> str:
    """The first line of why a test failed or was skipped."""
    longrepr = report.longrepr
    if isinstance(longrepr, tuple):  # skipped: file, line, reason
        text = longrepr[2].removeprefix("Skipped: ")
    else:
        crash = getattr(longrepr, "reprcrash", None)
        text = crash.message if crash is not None else str(longrepr)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or [""])[0][:300]


class Recorder:
    """Writes a line when a test begins and one when it ends."""

    def __init__(self, config: pytest.Config) -> None:
        path = config.getoption("gpu_records")
        self.file = open(path, "a", buffering=1) if path else None  # noqa: SIM115
        self.limit: float = config.getoption("gpu_limit")
        self.fraction: float = config.getoption("gpu_fraction")
        self.session: pytest.Session | None = None
        self.poisoned = False
        self.outcome: dict[str, Any] = {}

    def write(self, **line: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session
        if self.fraction < 1:
            import torch

            if torch.cuda.is_available():
                torch.cuda.set_per_process_memory_fraction(self.fraction)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            why = lines[-1][1:].strip() if lines else reason_of(report)
            self.write(collect=report.nodeid, reason=why)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """The watchdog is a thread of C: it also ends a test that hangs inside a CUDA call, after
        it has printed where every thread is.
        """
        self.outcome = {"test": item.nodeid, "outcome": "passed", "reason": "", "seconds": 0.0}
        self.write(start=item.nodeid)
        if self.limit:
            faulthandler.dump_traceback_later(self.limit, exit=True, file=STDERR)
        yield
        faulthandler.cancel_dump_traceback_later()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = self.outcome
        outcome["seconds"] = round(outcome["seconds"] + report.duration, 3)
        if report.failed:
            outcome.update(outcome="failed", reason=reason_of(report))
            self.poisoned |= POISONED.search(report.longreprtext) is not None
        elif report.skipped and not hasattr(report, "wasxfail"):
            outcome.update(outcome="skipped", reason=reason_of(report))
        if report.when == "teardown":
            self.write(**outcome)
            if self.poisoned and self.session is not None:
                self.session.shouldstop = "the GPU's context is poisoned: a new process goes on"
