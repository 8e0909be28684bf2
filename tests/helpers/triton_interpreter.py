"""Runs the tests marked `interpreted` in a second process, with Triton's interpreter for a GPU.

Triton makes a kernel for the interpreter or for a GPU when the kernel is imported, so one process
cannot hold both. These hooks (conftest.py imports them) run the selected tests of a file together
in one process under TRITON_INTERPRET=1 and report each here under its own name: a test is selected
by its node id, by -k or by -m as any other. In a process that already has TRITON_INTERPRET=1 the
tests run as they are.

The interpreter takes seconds for what a GPU does in microseconds: `make test` runs a sample of each
file's draws (`sampled`), `make audit` the rest.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

# As vicreg_kernels.core.dispatch has it, which would import torch here.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Where the second process writes its reports, a line of JSON each.
REPORTS = "VICREG_KERNELS_TEST_REPORTS"
_BATCHES = pytest.StashKey[dict[Path, dict[str, list[Any]]]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("triton") is None:
        for item in filter(_elsewhere, items):
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Reports what became of the test in the second process; None: pytest runs it here."""
    if not _elsewhere(item) or item.get_closest_marker("skip") is not None:
        return None
    batches = item.session.stash.setdefault(_BATCHES, {})
    if item.path not in batches:
        batches[item.path] = _run(item.path, item.session)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in batches[item.path][item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What earlier tests of this process left set up for this one.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the second process: hands the report to the first."""
    path = os.environ.get(REPORTS)
    if path and INTERPRETING:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(report._to_json()) + "\n")


def _elsewhere(item: pytest.Item) -> bool:
    return not INTERPRETING and item.get_closest_marker("interpreted") is not None


def _run(path: Path, session: pytest.Session) -> dict[str, list[Any]]:
    """Node id -> reports, of all selected tests of the file that are interpreted."""
    items = [item for item in session.items if item.path == path and _elsewhere(item)]
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "reports.jsonl")
        command = [sys.executable, "-m", "pytest", "-W", "ignore", "-p", "no:xdist"]
        run = subprocess.run(
            [*command, *(item.nodeid for item in items)],
            cwd=session.config.rootpath,
            env=_environment() | {REPORTS: str(written)},
            capture_output=True,
            text=True,
        )
        lines = written.read_text(encoding="utf-8").splitlines() if written.exists() else []
    reports: dict[str, list[Any]] = {item.nodeid: [] for item in items}
    for line in lines:
        report = pytest.TestReport._from_json(json.loads(line))
        if isinstance(report.longrepr, list):  # a skip's file, line and reason
            report.longrepr = tuple(report.longrepr)
        reports[report.nodeid].append(report)
    for item in items:
        if not any(report.when == "teardown" for report in reports[item.nodeid]):
            how = f"the interpreting process ended with {run.returncode} before this test did:\n"
            reports[item.nodeid].append(
                _failed(item, how + run.stdout[-4000:] + run.stderr[-2000:])
            )
    return reports


def _environment() -> dict[str, str]:
    # xdist's variables would make the second process a worker of the first one's run. Plugins,
    # which these tests do not use, take a third of the time in which it starts.
    kept = {name: word for name, word in os.environ.items() if not name.startswith("PYTEST_")}
    return kept | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def _failed(item: pytest.Item, why: str) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call")
