"""The tests of `make gpu`: none is lost between processes, and what dies, hangs or poisons its
process is named and costs one test.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import gpu_parity, stages
from bench.gpu_parity import Plan
from bench.gpu_records import PARTS
from bench.gpu_stages import GRAPHS
from bench.stages import FAIL, PASS, SKIPPED, Verdict

ROOT = Path(__file__).resolve().parents[2]
HEAD = "import os, signal, time\nimport pytest\npytestmark = pytest.mark.gpu\n"
# What a test's source says where it needs most of a GPU's memory.
HUNGRY = re.compile(r"2 ?\*\* ?31|1 ?<< ?31|mem_get_info|total_memory")
# Writes what `-m gpu` would select, apart from the plugin, after conftest.py has left out what a
# test's `triton_takes` leaves to the other backends.
PLUGIN = """
import json, os, pytest

def pytest_collection_modifyitems(items):
    marked = [item.nodeid for item in items if item.get_closest_marker("gpu")]
    open(os.environ["LISTED"], "w").write(json.dumps(marked))
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> tuple[dict[str, str], list[str]]:
    """What the plugin selects with its parts, and what is marked gpu."""
    folder = tmp_path_factory.mktemp("collected")
    (folder / "apart.py").write_text(PLUGIN)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        "LISTED": str(folder / "marked.json"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu_select", "-p", "apart"]
    command += ["--collect-only", "--gpu-list", str(folder / "chosen.json"), "tests"]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    chosen = json.loads((folder / "chosen.json").read_text())
    return chosen, json.loads((folder / "marked.json").read_text())


def test_the_parts_hold_the_whole_gpu_suite(collected):
    chosen, marked = collected
    assert len(marked) > 1000
    assert sorted(chosen) == sorted(marked)
    assert set(chosen.values()) == set(PARTS)
    jobs = gpu_parity.make_jobs(chosen)
    assert sorted(test for job in jobs for test in job.tests) == sorted(marked)
    files = {test.split("::")[0] for test in marked}
    assert "tests/vicreg/test_cpu.py" in files, "tests that take `fused` are among them"


def test_files_that_mark_tests_are_found_by_their_text(collected):
    """A file that could not be collected, since a package is missing, is missed then."""
    chosen, _ = collected
    plan = Plan(ROOT, Path())
    assert gpu_parity.uncollected(plan, chosen) == []
    fewer = {test: part for test, part in chosen.items() if "trainer/test_gpu" not in test}
    assert gpu_parity.uncollected(plan, fewer) == ["tests/trainer/test_gpu.py"]


def named(chosen: dict[str, str], said: re.Pattern[str]) -> set[str]:
    """The gpu tests whose source says this."""
    tests = set()
    for file in {test.split("::")[0] for test in chosen}:
        text = (ROOT / file).read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and said.search(
                ast.get_source_segment(text, node) or ""
            ):
                tests.add(f"{file}::{node.name}")
    return tests & {test.split("[")[0] for test in chosen}


def test_memory_hungry_tests_run_alone(collected):
    chosen, _ = collected
    hungry = named(chosen, HUNGRY)
    assert len(hungry) >= 8
    parts = {test.split("[")[0]: part for test, part in chosen.items()}
    assert {name: parts[name] for name in hungry if parts[name] != "memory"} == {}


def test_the_stage_of_graphs_has_every_test_that_captures_one(collected):
    chosen, _ = collected
    capturing = named(chosen, re.compile(r"(CUDAGraph|captured|check_replays)\("))
    assert len(capturing) >= 8
    assert [name for name in capturing if not re.search(GRAPHS, name.split("::")[1])] == []


def test_cuda_comes_before_triton_and_memory_last(collected):
    jobs = gpu_parity.make_jobs(collected[0])
    parts = [job.part for job in jobs]
    assert parts == sorted(parts, key=PARTS.index)
    titles = [job.title for job in jobs if job.part == "cuda"]
    ops = [title.split("/")[0] for title in titles]
    assert list(dict.fromkeys(ops))[:3] == ["vicreg", "attention", "ema"]
    assert titles[-1] == "trainer/test_gpu"
    assert [job.title for job in jobs if job.part == "memory"] == ["all"]


def run(
    tmp_path: Path,
    monkeypatch,
    seconds: float = 600,
    limit: float = 60,
    fraction: float = 1.0,
    **files: str,
) -> Verdict:
    """The runner on a project of these files of tests. fraction: a share of the GPU's memory, for
    which each process imports torch.
    """
    monkeypatch.setattr(gpu_parity, "FRACTION", fraction)
    folder = tmp_path / "tests"
    folder.mkdir()
    for name, body in files.items():
        (folder / f"test_{name}.py").write_text(HEAD + body)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    plan = Plan(tmp_path, tmp_path / "results", workers=2, test_seconds=limit)
    return gpu_parity.run(plan, tmp_path / "parity.log", seconds, lambda line: None)


def test_all_passed(tmp_path, monkeypatch):
    body = "@pytest.mark.parametrize('b', ['cuda', 'triton'])\ndef test_it(b): pass\n"
    two = body + "def test_peak_memory(): pass\n"
    verdict = run(tmp_path, monkeypatch, fraction=gpu_parity.FRACTION, one=body, two=two)
    assert (verdict.status, verdict.reason) == (PASS, "5 passed")
    assert len(list((tmp_path / "results").glob("*.xml"))) == 5, "a process a file and part"


def test_a_crash_costs_one_test(tmp_path, monkeypatch):
    body = (
        "def test_before(): pass\n"
        "def test_crash(): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_after(): pass\n"
    )
    verdict = run(tmp_path, monkeypatch, one=body, two="def test_other(): pass\n")
    assert verdict.status == FAIL
    assert verdict.reason == "3 passed, 1 failed, 1 crashed"
    assert list(verdict.failures) == [
        "tests/test_one.py::test_crash",
        "tests/test_one.py::test_wrong",
    ]
    assert "SIGSEGV" in verdict.failures["tests/test_one.py::test_crash"]
    assert verdict.failures["tests/test_one.py::test_wrong"] == "assert 1 == 2"


def test_a_hang_is_named_with_its_traceback(tmp_path, monkeypatch):
    body = (
        "def test_hang():\n"
        "    # as a call into CUDA that does not come back: no signal reaches Python\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})\n"
        "    time.sleep(600)\n"
        "def test_after(): pass\n"
    )
    verdict = run(tmp_path, monkeypatch, limit=2, one=body)
    assert (verdict.status, verdict.reason) == (FAIL, "1 passed, 1 hung")
    assert "more than 2 s" in verdict.failures["tests/test_one.py::test_hang"]
    text = (tmp_path / "results" / "test-one-cuda.log").read_text()
    assert "Timeout (0:00:02)!" in text
    assert "in test_hang" in text


def test_a_poisoned_context_costs_one_test(tmp_path, monkeypatch):
    body = (
        "STATE = []\n"
        "def test_bad():\n"
        "    STATE.append(1)\n"
        "    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_after(): assert not STATE, 'the same process'\n"
        "def test_memory(): raise RuntimeError('CUDA error: out of memory')\n"
        "def test_last(): assert not STATE\n"
    )
    verdict = run(tmp_path, monkeypatch, one=body)
    assert verdict.reason == "2 passed, 2 failed"
    assert "illegal memory access" in verdict.failures["tests/test_one.py::test_bad"]


def test_what_has_not_enough_memory_beside_others_runs_again_alone(tmp_path, monkeypatch):
    body = (
        "import pathlib\n"
        "seen = pathlib.Path(__file__).with_suffix('.seen')\n"
        "def test_large():\n"
        "    if not seen.exists():\n"
        "        seen.touch()\n"
        "        raise RuntimeError('CUDA out of memory. Tried to allocate 9 GiB')\n"
        "def test_too_large(): raise RuntimeError('CUDA out of memory.')\n"
        "def test_other(): pass\n"
    )
    verdict = run(tmp_path, monkeypatch, one=body)
    assert verdict.reason == "2 passed, 1 failed"
    assert list(verdict.failures) == ["tests/test_one.py::test_too_large"]


def test_the_stage_keeps_its_seconds_and_says_what_it_did_not_reach(tmp_path, monkeypatch):
    """On a clock that goes on to a second before the stage must end its tests, once one of them
    sleeps: however busy the machine is, that test has begun.
    """
    asleep = tmp_path / "asleep"
    body = (
        f"def test_slow(): open({str(asleep)!r}, 'w').close(); time.sleep(600)\n"
        "def test_later(): pass\n"
    )
    start, seconds = time.monotonic(), 300
    spare = stages.ending_seconds()
    jumps: list[float] = []

    def now() -> float:
        if asleep.exists() and not jumps:
            jumps.append(start + seconds - spare - 1 - time.monotonic())
        return time.monotonic() + sum(jumps)

    monkeypatch.setattr(gpu_parity, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))
    verdict = run(tmp_path, monkeypatch, seconds=seconds, limit=500, one=body)
    assert now() - start < seconds + 1
    assert verdict.status == FAIL
    assert verdict.reason == "1 stopped, 1 not reached"
    assert "time was up" in verdict.failures["tests/test_one.py::test_slow"]
    assert verdict.notes[0].startswith("1 of 2 not reached: test_one cuda")
    # SIGINT comes first, and pytest says where it was
    assert "KeyboardInterrupt" in (tmp_path / "results" / "test-one-cuda.log").read_text()


def test_what_cannot_be_collected_is_named_and_the_rest_runs(tmp_path, monkeypatch):
    verdict = run(tmp_path, monkeypatch, one="import no_such_module\n", two="def test_a(): pass\n")
    assert verdict.status == FAIL
    (title,) = verdict.failures
    assert title == "tests/test_one.py cannot be collected"
    assert "no_such_module" in verdict.failures[title]
    assert verdict.reason.startswith("1 passed")


def test_nothing_collected_is_a_failure(tmp_path, monkeypatch):
    verdict = run(tmp_path, monkeypatch, one="pytestmark = []\ndef test_unmarked(): pass\n")
    assert (verdict.status, verdict.reason) == (FAIL, "no test was collected")


def test_a_file_that_skips_everything_proves_nothing(tmp_path, monkeypatch):
    body = "def test_a(): pytest.skip('triton is missing')\n"
    verdict = run(tmp_path, monkeypatch, one=body, two="def test_b(): pass\n" + body)
    assert verdict.status == SKIPPED
    assert verdict.reason == "1 passed, 2 skipped; all skipped: test_one cuda"
    assert verdict.notes == ["2 skipped: triton is missing"]


def test_a_process_that_dies_after_its_tests_is_a_failure(tmp_path, monkeypatch):
    body = (
        "import atexit\n"
        "def test_a(): atexit.register(lambda: os.kill(os.getpid(), signal.SIGSEGV))\n"
    )
    verdict = run(tmp_path, monkeypatch, one=body)
    assert verdict.status == FAIL
    assert verdict.failures == {"test_one cuda": "its process ended by SIGSEGV"}


def test_workers_by_cores_and_memory(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1 << 12, "SC_PHYS_PAGES": 1 << 25}.get)
    assert gpu_parity.count_workers(78 << 30) == 8
    assert gpu_parity.count_workers(16 << 30) == 2
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1 << 12, "SC_PHYS_PAGES": 1 << 22}.get)
    assert gpu_parity.count_workers(78 << 30) == 3
