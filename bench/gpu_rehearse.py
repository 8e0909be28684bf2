"""A rehearsal of `make gpu`: the command on the CPU, under the limits of a bare GPU machine.

In a scratch copy of what such a machine gets (tracked files, and untracked ones that git does not
ignore, of at most 64 MiB), without a network, killed after ten minutes. The compiled library's CPU
backend and Triton's interpreter stand in for a GPU, programs that print their verdicts for
compute-sanitizer and ncu. What came back is held to the machine's rules, and failures can be
injected: each must be named by the summary, and everything else still be done.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bench import stages
from bench.gpu_summary import ARCHIVE, SUMMARY

KILLED_AFTER = 600.0
FILES, FILE_BYTES, DEPTH = 8, 16 << 20, 2
# Of those eight files, what the command allows itself.
OWN_FILES = 6
SHOWN, SUMMARY_CHARACTERS = 12_000, 8000
TREE_BYTES = 64 << 20
NEVER_COPIED = {".git", ".venv", "__pycache__"}

# The tests of a rehearsal: one for each part of a run, some with `graph` in their names for the
# stage that selects by it, and what is injected; in one file, of which the others must still run.
TESTS = """\
import os
import signal
import time

import pytest
import torch


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_graph_stands_in(backend):
    assert backend


def test_peak_memory_stands_in():
    assert torch.ones(3).sum() == 3
"""
INJECTED = {
    "hang": "def test_graph_injected_hang():\n    time.sleep(3600)\n",
    "crash": "def test_graph_injected_crash():\n    os.kill(os.getpid(), signal.SIGSEGV)\n",
    "parity": "def test_graph_injected_parity():\n"
    "    torch.testing.assert_close(torch.tensor(1.0), torch.tensor(1.5))\n",
}
LAST_TEST = "def test_graph_after_the_injected():\n    assert True\n"
# How the summary tells them apart.
SAID = {"hang": "hung: ", "crash": "SIGSEGV", "parity": "not close"}
REHEARSED = "tests/test_rehearsed.py"
# Runs what follows its options and says what the tool would say.
TOOL = """\
#!{python}
import subprocess, sys
words = sys.argv[1:]
command = words[words.index({python!r}):]
print({line!r}, flush=True)
sys.exit(subprocess.run(command).returncode)
"""
TOOLS = {
    "compute-sanitizer": "========= ERROR SUMMARY: 0 errors (a rehearsal)",
    "ncu": "==PROF== Profiling nothing (a rehearsal)",
}
# Where no namespace without a network can be made: every connection is refused in Python.
NO_SOCKETS = """\
import socket

def refuse(*args, **options):
    raise OSError("a rehearsal has no network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def ignored_patterns(root: Path) -> list[str]:
    lines = (root / ".gitignore").read_text().splitlines()
    return [line.strip().rstrip("/") for line in lines if line.strip() and line[0] != "#"]


def tree(root: Path) -> list[Path]:
    """What the machine gets, relative to the root; without git by .gitignore's plain patterns."""
    command = ["git", "-C", str(root), "ls-files", "-coz", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
        names = [Path(name) for name in done.stdout.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        patterns = ignored_patterns(root)
        names = []
        for folder, folders, files in os.walk(root):
            here = Path(folder).relative_to(root)

            def kept(name: str, here: Path = here) -> bool:
                path = (here / name).as_posix()
                return name not in NEVER_COPIED and not any(
                    fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch("/" + path, pattern)
                    for pattern in patterns
                )

            folders[:] = [name for name in folders if kept(name)]
            names += [here / name for name in files if kept(name)]
    return [name for name in names if (root / name).is_file()]


def copy(root: Path, to: Path, carried: Sequence[str]) -> int:
    """Copies the tree and the carried paths, times included; how many bytes they are."""
    names = tree(root)
    for path in carried:
        source = root / path
        files = [source] if source.is_file() else sorted(source.rglob("*"))
        names += [name.relative_to(root) for name in files if name.is_file()]
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, to / name)
    return sum((to / name).stat().st_size for name in names)


def inject(root: Path, kinds: Sequence[str]) -> None:
    """Puts the tests of a rehearsal and failures into a copy of the tree."""
    if "build" in kinds:
        for path in sorted((root / "csrc").rglob("*.cpp")):
            path.write_text(f'#include "injected_by_the_rehearsal.h"\n{path.read_text()}')
    bodies = [INJECTED[kind] for kind in kinds if kind in INJECTED]
    (root / REHEARSED).parent.mkdir(exist_ok=True)
    (root / REHEARSED).write_text("\n\n".join([TESTS, *bodies, LAST_TEST]))


def isolated(command: list[str], folder: Path, environment: dict[str, str]) -> list[str]:
    """The command without a network: in a namespace of its own, else with sockets refused."""
    for words in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and subprocess.run([*words, "true"], stderr=-3).returncode == 0:
            return [*words, *command]
    (folder / "sitecustomize.py").write_text(NO_SOCKETS)
    path = [str(folder), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return command


def brought_back(out: Path, printed: str) -> list[str]:
    """The rules of the machine that the results break."""
    paths = [path for path in sorted(out.rglob("*")) if path.is_file()]
    broken = []
    if len(paths) > OWN_FILES:
        broken.append(f"{len(paths)} files, of which {FILES} would come back")
    for path in paths:
        name = path.relative_to(out)
        if path.stat().st_size > FILE_BYTES:
            broken.append(f"{name} is larger than 16 MiB")
        if len(name.parts) > DEPTH + 1:
            broken.append(f"{name} lies more than two folders down")
    summary = out / SUMMARY
    if not summary.exists():
        return [*broken, f"there is no {SUMMARY}"]
    text = summary.read_text()
    if len(text) >= SUMMARY_CHARACTERS:
        broken.append(f"{SUMMARY} has {len(text)} characters")
    if text.strip() not in printed[-SHOWN:]:
        broken.append(f"the last {SHOWN} characters of output do not hold the whole summary")
    try:
        with tarfile.open(out / ARCHIVE) as archive:
            if SUMMARY not in archive.getnames():
                broken.append(f"{ARCHIVE} has no {SUMMARY}")
    except (OSError, tarfile.TarError) as error:
        broken.append(f"{ARCHIVE} cannot be read: {error}")
    return broken


def missed(kinds: Sequence[str], code: int, text: str) -> list[str]:
    """Injected failures that the summary and the exit status do not show, and what else is not as
    it was without them.
    """
    faults = []
    if code != 1:
        faults.append(f"the exit status is {code} though failures were injected")
    lines = text.splitlines()
    tests = [kind for kind in kinds if kind in INJECTED]
    for kind in kinds:
        if kind == "build":
            said = any(line.startswith("- FAIL build") and "injected" in line for line in lines)
        else:
            test = f"- {REHEARSED}::test_graph_injected_{kind}: "
            said = any(line.startswith(test) and SAID[kind] in line for line in lines)
        if not said:
            faults.append(f"the summary does not show the injected {kind}")
    failed = sum(line.startswith("- tests/") for line in lines)
    if "build" not in kinds and failed != len(tests):
        faults.append(f"{failed} tests failed, {len(tests)} of them injected")
    for line in lines:
        stage = re.match(r"- (FAIL|SKIPPED \(not proved\)|NOT REACHED) ([^,:]+)", line)
        if stage is not None and (stage[1] == "NOT REACHED" or not touched(stage[2], kinds)):
            faults.append(f"nothing was injected into: {line[2:]}")
        if " not reached" in line:
            faults.append(f"not done: {line[2:]}")
    return faults


def touched(stage: str, kinds: Sequence[str]) -> bool:
    """Whether what was injected makes this stage fail. Without the compiled library, benchmarks
    and the trainer run on the reference.
    """
    if stage in ("parity", "graphs"):
        return True
    if "build" not in kinds:
        return False
    return not stage.startswith("figures") and stage not in ("info", "trainer", "compiled figures")


def command_of(options: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "bench.gpu", options.stage, "--device", "cpu"]
    command += ["--budget", str(options.budget), "--build", options.build]
    command += ["--ops", ",".join(options.ops), "--test-seconds", str(options.test_seconds)]
    tests = options.tests if options.tests == ["tests"] else [*options.tests, REHEARSED]
    return [*command, "--tests", *tests]


def watched(
    command: list[str], root: Path, environment: dict[str, str], seconds: float
) -> tuple[int, str]:
    """Runs the command as the machine does: all of it is killed after so many seconds. The exit
    status and what it printed, which is printed here as it comes.
    """
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
        return process.wait(), "".join(lines)
    finally:
        timer.cancel()


def rehearse(options: argparse.Namespace, root: Path) -> int:
    """0: the machine's rules were kept, injected failures shown, and all else passed; else 1."""
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
        scratch = Path(name)
        work, out, tools = scratch / "tree", scratch / "out", scratch / "tools"
        out.mkdir()
        tools.mkdir()
        size = copy(root, work, options.carry)
        inject(work, options.inject)
        for tool, line in TOOLS.items():
            (tools / tool).write_text(TOOL.format(python=sys.executable, line=line))
            (tools / tool).chmod(0o755)
        environment = {
            key: os.environ[key] for key in ("HOME", "LANG", "PYTHONPATH") if key in os.environ
        }
        environment["PATH"] = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
        environment |= {"OUT": str(out), "PYTHONDONTWRITEBYTECODE": "1"}
        command = isolated(command_of(options), tools, environment)
        begun = time.monotonic()
        code, printed = watched(command, work, environment, KILLED_AFTER)
        seconds = time.monotonic() - begun
        wrong = brought_back(out, printed)
        if size > TREE_BYTES:
            wrong.append(f"the tree has {size >> 20} MiB, of at most {TREE_BYTES >> 20}")
        if seconds > options.budget + 10:
            wrong.append(f"it took {seconds:.0f} s of {options.budget:.0f}")
        text = (out / SUMMARY).read_text() if (out / SUMMARY).exists() else ""
        if options.inject:
            wrong += missed(options.inject, code, text)
        elif code:
            wrong.append(f"the command {stages.describe(code)}")
        for line in wrong:
            print(f"rehearsal: {line}")
        kept = os.environ.get("OUT")
        if kept:
            Path(kept).mkdir(parents=True, exist_ok=True)
            for path in out.iterdir():
                shutil.copy2(path, Path(kept) / path.name)
        injected = f", injected: {', '.join(options.inject)}" if options.inject else ""
        verdict = "FAIL" if wrong else "PASS"
        print(f"rehearsal of {options.stage}: {verdict} after {seconds:.0f} s{injected}")
        return 1 if wrong else 0
