"""The tests of `make gpu`: one process a file and part, side by side, each test accounted for.

First all tests are collected, so that every one must end up as passed, failed, skipped, crashed,
hung or not reached. A process that dies or whose GPU context is poisoned is started again for the
tests that it has not come to: a crash costs one test.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import stages
from bench.gpu_records import PARTS, finished, read
from bench.stages import FAIL, PASS, SKIPPED, Verdict

# CUDA before Triton, and these ops first; the trainer last.
FIRST = ("vicreg", "attention", "ema")
LAST = ("trainer",)
# A process that dies this often is not started again.
RESTARTS = 5
# Of each process: its CUDA context, its modules and Triton's compiler, and its tests' tensors.
HOST_GIB, DEVICE_GIB = 5, 6
# Seconds a test may take; with Triton's or Inductor's compilations in it.
TEST_SECONDS = 90.0
# Of the GPU's memory, for each of the processes that share it. A test that has not enough is run
# again alone.
FRACTION = 0.25
# Of the stage's time, kept for the memory-hungry tests, which run alone after all others.
ALONE = 0.2
COLLECTING = 60.0
MARKED = re.compile(
    r"^(pytestmark = |@)pytest\.mark\.gpu\b|^def test_\w+\([^)]*\bfused\b", re.MULTILINE
)


@dataclass
class Plan:
    """How the tests are run. device: cpu where a run is rehearsed. word: only tests whose name has
    this pattern. packages: a folder that the trainer's tests have on their path. folder: where
    records and junit files go. triton: environment variables of Triton's tests.
    """

    root: Path
    folder: Path
    device: str = "cuda"
    word: str = ""
    packages: Path | None = None
    workers: int = 1
    test_seconds: float = TEST_SECONDS
    paths: Sequence[str] = ("tests",)
    triton: dict[str, str] = field(default_factory=dict)


@dataclass
class Job:
    """The tests of one part in one file, or of one part in all files."""

    title: str
    part: str
    files: list[str]
    tests: list[str]
    starts: int = 0
    note: str = ""
    ended: bool = False
    process: subprocess.Popen[bytes] | None = None
    log: Path = Path()

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"{self.title} {self.part}".lower())


def count_workers(device_bytes: int | None) -> int:
    """Half the cores, at least two, as far as the memory of the host and of the GPU reaches."""
    counts = [max(2, (os.cpu_count() or 2) // 2)]
    try:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        counts.append(host // (HOST_GIB << 30))
    except (ValueError, OSError):
        pass
    if device_bytes is not None:
        counts.append(device_bytes // (DEVICE_GIB << 30))
    return max(1, min(counts))


def rank(title: str) -> tuple[int, str]:
    """The order of the test files: FIRST, the others by name, LAST."""
    for place, op in enumerate(FIRST):
        if title.startswith(f"{op}/"):
            return place, title
    late = any(word in title for word in LAST)
    return len(FIRST) + late, title


def title_of(file: str) -> str:
    """vicreg/test_cpu of tests/vicreg/test_cpu.py."""
    return file.removeprefix("tests/").removesuffix(".py")


def make_jobs(tests: dict[str, str]) -> list[Job]:
    """tests: node id -> part. In the order in which they are started."""
    jobs: dict[tuple[str, str], Job] = {}
    for test, part in tests.items():
        file = test.split("::")[0]
        title = "all" if part == "memory" else title_of(file)
        job = jobs.setdefault((title, part), Job(title, part, [], []))
        job.tests.append(test)
        if file not in job.files:
            job.files.append(file)
    return sorted(jobs.values(), key=lambda job: (PARTS.index(job.part), rank(job.title)))


def pytest_command(plan: Plan, *words: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu_select", "-rfE", "--tb=short"]
    command += ["--gpu-device", plan.device, "--continue-on-collection-errors"]
    if plan.word:
        command += ["--gpu-word", plan.word]
    return [*command, *words]


def environment(plan: Plan, with_packages: bool, triton: bool) -> dict[str, str]:
    paths = [str(plan.root), os.environ.get("PYTHONPATH", "")]
    if with_packages and plan.packages is not None:
        paths.append(str(plan.packages))
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "2",
        # None of the machine's own pytest plugins: they take seconds to import, and may interfere.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        **(plan.triton if triton else {}),
    }


def collect(plan: Plan, log: Path, seconds: float) -> tuple[dict[str, str], dict[str, str], str]:
    """Node id -> part, files that could not be collected -> why, and why there are no tests."""
    listed, errors = plan.folder / "tests.json", plan.folder / "collection.jsonl"
    words = ["--collect-only", "--gpu-list", str(listed), "--gpu-records", str(errors)]
    process = stages.start(
        pytest_command(plan, *words, *plan.paths), log, environment(plan, True, True), plan.root
    )
    if process is None:
        return {}, {}, "pytest cannot be started"
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return {}, {}, f"the tests were not collected within {seconds:.0f} s"
    finally:
        stages.end([process])
    broken = {line["collect"]: line["reason"] for line in read(errors) if "collect" in line}
    if not listed.exists():
        lines = log.read_text(errors="replace").rstrip().splitlines()
        return {}, broken, f"collecting failed, {stages.describe(code)}: {lines[-1][:200]}"
    return json.loads(listed.read_text()), broken, ""


def uncollected(plan: Plan, tests: dict[str, str]) -> list[str]:
    """Files that mark a test as gpu, by their text, of which no test was collected."""
    files = {test.split("::")[0] for test in tests}
    names = []
    for path in sorted((plan.root / "tests").rglob("test_*.py")):
        name = path.relative_to(plan.root).as_posix()
        if name not in files and MARKED.search(path.read_text(errors="replace")):
            names.append(name)
    return names


class Pool:
    """Runs jobs side by side and reads what became of their tests."""

    def __init__(self, plan: Plan, say: Callable[[str], Any]) -> None:
        self.plan, self.say = plan, say
        self.running: list[Job] = []
        self.deaths: dict[str, str] = {}

    def records(self, job: Job) -> Path:
        return self.plan.folder / f"{job.slug}.jsonl"

    def start(self, job: Job, fraction: float) -> None:
        job.starts += 1
        job.log = self.plan.folder / f"{job.slug}.log"
        tests = self.plan.folder / f"{job.slug}.json"
        tests.write_text(json.dumps(job.tests))
        words = ["--gpu-tests", str(tests), "--gpu-records", str(self.records(job))]
        words += ["--gpu-limit", str(self.plan.test_seconds), "--gpu-fraction", f"{fraction:.3f}"]
        words += [f"--junitxml={self.plan.folder / job.slug}.{job.starts}.xml"]
        late = any(word in job.title for word in LAST) or job.title == "all"
        command = pytest_command(self.plan, *words, *job.files)
        variables = environment(self.plan, late, job.part == "triton")
        job.process = stages.start(command, job.log, variables, self.plan.root)
        if job.process is None:
            job.note, job.ended = "pytest cannot be started", True
        else:
            self.running.append(job)

    def note_death(self, job: Job, code: int, stopped: str = "") -> bool:
        """Records the test that a process died in; False where it died outside of any."""
        path = self.records(job)
        done = finished(path)
        begun = [line["start"] for line in read(path) if line.get("start") not in (None, *done)]
        if not begun:
            return False
        outcome, reason = "crashed", f"its process {stages.describe(code)}"
        if stopped:
            outcome, reason = "stopped", stopped
        elif "Timeout (" in job.log.read_text(errors="replace")[-20000:] and code > 0:
            outcome = "hung"
            reason = f"it took more than {self.plan.test_seconds:.0f} s; {job.log.name} says where"
        line = {"test": begun[-1], "outcome": outcome, "reason": reason}
        with path.open("a") as file:
            file.write("\n" + json.dumps(line) + "\n")
        return True

    def reap(self, job: Job) -> bool:
        """Whether the job's process has ended, and there are tests that another one must do."""
        assert job.process is not None
        code = job.process.poll()
        if code is None:
            return False
        self.running.remove(job)
        stages.end([job.process])
        died = self.note_death(job, code)
        left = len(set(job.tests) - finished(self.records(job)))
        if code < 0 and not died:
            self.deaths[f"{job.title} {job.part}"] = f"its process {stages.describe(code)}"
        job.ended = True
        if left and job.starts <= RESTARTS and (died or code in (1, 2)):
            self.say(f"  {job.title} {job.part}: {left} tests go on in a new process")
            job.ended = False
            return True
        if left:
            job.note = f"its process {stages.describe(code)}"
        return False

    def run(self, jobs: Sequence[Job], workers: int, until: float, fraction: float) -> None:
        waiting = list(jobs)
        while (waiting or self.running) and time.monotonic() < until:
            while waiting and len(self.running) < workers:
                self.start(waiting.pop(0), fraction)
            for job in list(self.running):
                if self.reap(job):
                    waiting.insert(0, job)
            time.sleep(stages.POLL)
        processes = [job.process for job in self.running if job.process is not None]
        stages.end(processes)
        for job in self.running:
            code = job.process.returncode if job.process is not None else 1
            self.note_death(job, code, "it was running when the stage's time was up")
            job.note = "the stage's time was up"
        self.running = []


def too_large(pool: Pool, jobs: Sequence[Job]) -> list[str]:
    """Tests that failed since the GPU's memory was shared."""
    lines = [line for job in jobs for line in read(pool.records(job))]
    failed = {line["test"]: line["reason"] for line in lines if line.get("outcome") == "failed"}
    return [test for test, reason in failed.items() if "out of memory" in reason.lower()]


def judge(plan: Plan, tests: dict[str, str], jobs: Sequence[Job], bad: dict[str, str]) -> Verdict:
    """Every collected test as what it came to, and what that says of the stage.

    bad: what went wrong outside of the tests.
    """
    ended: dict[str, dict[str, Any]] = {}
    for job in jobs:
        records = read(plan.folder / f"{job.slug}.jsonl")
        ended |= {line["test"]: line for line in records if "test" in line}
    failures = dict(bad)
    # a list of failures is shortened from its end: what ended a process comes first
    for outcome in ("crashed", "hung", "failed", "stopped"):
        for test, line in ended.items():
            if line["outcome"] == outcome:
                said = line["reason"] if outcome == "failed" else f"{outcome}: {line['reason']}"
                failures[test] = said
    counts = Counter(line["outcome"] for test, line in ended.items() if test in tests)
    missed = [test for test in tests if test not in ended]
    notes = []
    for job in jobs:
        left = sum(test not in ended for test in job.tests)
        if left:
            why = job.note or "it was not started"
            what = f"{job.title} {job.part}, {why}"
            notes.append(f"{left} of {len(job.tests)} not reached: {what}")
    skips = Counter(line["reason"] for line in ended.values() if line["outcome"] == "skipped")
    notes += [f"{count} skipped: {reason}" for reason, count in skips.most_common(8)]
    unproved = [
        f"{job.title} {job.part}"
        for job in jobs
        if all(ended.get(test, {}).get("outcome") == "skipped" for test in job.tests)
    ]
    if plan.device == "cuda" and not plan.word:
        unproved += [f"{name} (not collected)" for name in uncollected(plan, tests)]
    names = ("passed", "failed", "crashed", "hung", "stopped")
    parts = [f"{counts[name]} {name}" for name in names]
    parts += [f"{counts['skipped']} skipped", f"{len(missed)} not reached"]
    reason = ", ".join(part for part in parts if not part.startswith("0 ")) or "no test ran"
    if unproved:
        reason += f"; all skipped: {', '.join(unproved)}"
    failed = failures or missed or not counts["passed"] + counts["skipped"]
    status = FAIL if failed else SKIPPED if unproved else PASS
    return Verdict(status, reason, "", failures, notes)


def run(plan: Plan, log: Path, seconds: float, say: Callable[[str], Any]) -> Verdict:
    """Collects and runs the tests within `seconds`."""
    begun = time.monotonic()
    until = begun + seconds - stages.ending_seconds()
    plan.folder.mkdir(parents=True, exist_ok=True)
    for old in plan.folder.iterdir():
        old.unlink()
    tests, broken, why = collect(plan, log, min(COLLECTING, seconds / 2))
    failures = {f"{name} cannot be collected": reason for name, reason in broken.items()}
    if not tests:
        text = log.read_text(errors="replace") if log.exists() else ""
        return Verdict(FAIL, why or "no test was collected", text, failures)
    jobs = make_jobs(tests)
    together = [job for job in jobs if job.part != "memory"]
    alone = [job for job in jobs if job.part == "memory"]
    say(f"  {len(tests)} tests in {len(jobs)} processes, {plan.workers} at a time")
    pool = Pool(plan, say)
    kept = ALONE * (until - time.monotonic()) if alone else 0.0
    pool.run(together, plan.workers, until - kept, max(FRACTION, 0.9 / plan.workers))
    again = too_large(pool, together)
    if again:
        say(f"  {len(again)} tests had not enough memory and run again alone")
        alone.append(make_jobs(dict.fromkeys(again, "memory"))[0])
        alone[-1].title = "again"
        jobs += alone[-1:]
    pool.run(alone, 1, until, 1.0)
    output = log.read_text(errors="replace") if log.exists() else ""
    verdict = judge(plan, tests, jobs, failures | pool.deaths)
    with log.open("a") as file:
        for test, reason in verdict.failures.items():
            file.write(f"{test}: {reason}\n")
    return Verdict(verdict.status, verdict.reason, output, verdict.failures, verdict.notes)
