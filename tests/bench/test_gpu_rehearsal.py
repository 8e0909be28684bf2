"""`make gpu` rehearsed on the CPU in small, with a hang, a crash and a wrong result; and that a
rehearsal itself can fail.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench import gpu, gpu_rehearse

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("build", "hang", "crash", "parity")


def test_a_rehearsal_with_failures(tmp_path):
    """A build, a hang, a crash and a wrong result: each is shown, and everything else is done. The
    rehearsal's own verdict is that it was so.
    """
    words = ["--rehearse", "--ops", "tokens", "--tests", "tests/ema/test_reference.py"]
    words += ["--test-seconds", "8"]
    for kind in KINDS:
        words += ["--inject", kind]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "gpu", *words],
        cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("# FAIL: bench.gpu gpu on the CPU")
    lines = text.splitlines()
    (parity,) = [line for line in lines if " parity, " in line]
    # a test that needs the library, which was not built, proves nothing
    skipped = "1 skipped; all skipped: ema/test_reference cuda"
    assert parity.endswith(f": 4 passed, 1 failed, 1 crashed, 1 hung, {skipped}")
    assert any(line.startswith("- PASS figures of tokens") for line in lines)
    assert any(re.match(r"- tokens .*: reference [\d.]+ ms", line) for line in lines), "a figure"
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = archive.getnames()
        log = archive.extractfile("tests/parity/test-rehearsed-cuda.log").read().decode()
    assert {"records/tokens.json", "logs/build.log", "summary.md"} <= set(names)
    assert "in test_graph_injected_hang" in log, "where it hung"
    assert any(name.endswith(".xml") for name in names)


def tree(root: Path) -> Path:
    """A checkout with a tracked, an untracked and an ignored file."""
    (root / "csrc" / "ema").mkdir(parents=True)
    (root / "csrc" / "ema" / "cpu.cpp").write_text("int x;\n")
    (root / "tests").mkdir()
    (root / "new.py").write_text("")
    (root / "build").mkdir()
    (root / "build" / "left.o").write_text("")
    (root / "_C.abi3.so").write_text("")
    (root / ".gitignore").write_text("# built\nbuild/\n*.so\n")
    return root


@pytest.mark.parametrize("with_git", [True, False])
def test_the_copy_is_what_the_machine_gets(tmp_path, with_git):
    root = tree(tmp_path / "root")
    if with_git:
        subprocess.run(["git", "init", "-q", str(root)], check=True)
        subprocess.run(["git", "-C", str(root), "add", "csrc", ".gitignore"], check=True)
    gpu_rehearse.copy(root, tmp_path / "copy", [])
    files = {p.relative_to(tmp_path / "copy").as_posix() for p in (tmp_path / "copy").rglob("*.*")}
    assert files == {".gitignore", "new.py", "csrc/ema/cpu.cpp"}
    size = gpu_rehearse.copy(root, tmp_path / "more", ["_C.abi3.so", "build"])
    assert (tmp_path / "more" / "_C.abi3.so").exists()
    assert (tmp_path / "more" / "build" / "left.o").exists()
    assert size == sum(p.stat().st_size for p in (tmp_path / "more").rglob("*") if p.is_file())


def test_an_injected_build_does_not_compile(tmp_path):
    root = tree(tmp_path / "root")
    gpu_rehearse.inject(root, ["build", "crash"])
    source = root / "csrc" / "ema" / "cpu.cpp"
    done = subprocess.run(["c++", "-fsyntax-only", str(source)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "injected_by_the_rehearsal" in done.stderr
    text = (root / gpu_rehearse.REHEARSED).read_text()
    assert "test_graph_injected_crash" in text
    assert "test_graph_injected_hang" not in text


def results(out: Path, text: str = "# PASS: all\n") -> str:
    """What a command leaves, and what it printed."""
    out.mkdir(exist_ok=True)
    (out / "summary.md").write_text(text)
    with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
        archive.add(out / "summary.md", "summary.md")
    return f"[build] PASS\n\n{text}\n"


def test_the_machines_rules_are_held(tmp_path, monkeypatch):
    out = tmp_path / "out"
    printed = results(out)
    assert gpu_rehearse.brought_back(out, printed) == []
    assert "do not hold" in gpu_rehearse.brought_back(out, "something else")[0]
    assert "do not hold" in gpu_rehearse.brought_back(out, printed + "x" * 12_000)[0]
    for number in range(5):
        (out / f"{number}.log").write_text("")
    assert "7 files" in gpu_rehearse.brought_back(out, printed)[0]
    for number in range(5):
        (out / f"{number}.log").unlink()
    deep = out / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "d.log").write_text("")
    assert "two folders" in gpu_rehearse.brought_back(out, printed)[0]
    (deep / "d.log").unlink()
    monkeypatch.setattr(gpu_rehearse, "FILE_BYTES", 50)
    assert "larger" in gpu_rehearse.brought_back(out, printed)[0]
    monkeypatch.undo()
    (out / "results.tar.gz").write_bytes(b"half")
    assert "cannot be read" in gpu_rehearse.brought_back(out, printed)[0]
    printed = results(out, "x" * 8000)
    assert "8000 characters" in gpu_rehearse.brought_back(out, printed)[0]
    (out / "summary.md").unlink()
    assert gpu_rehearse.brought_back(out, printed) == ["there is no summary.md"]


GOOD = """\
# FAIL: bench.gpu gpu

- FAIL build, 1 s: exit status 1; fatal error: injected_by_the_rehearsal.h
- PASS info, 1 s
- FAIL parity, 9 s: 3 passed, 1 failed, 1 crashed, 1 hung
- PASS figures of ema, 9 s

## Failed tests

- tests/test_rehearsed.py::test_graph_injected_crash: crashed: its process ended by SIGSEGV
- tests/test_rehearsed.py::test_graph_injected_hang: hung: it took more than 4 s
- tests/test_rehearsed.py::test_graph_injected_parity: AssertionError: Scalars are not close!
"""


def test_injected_failures_must_be_shown():
    assert gpu_rehearse.missed(KINDS, 1, GOOD) == []
    assert "exit status is 0" in gpu_rehearse.missed(KINDS, 0, GOOD)[0]
    for kind, line in zip(KINDS, [2, 10, 9, 11], strict=True):
        lines = GOOD.splitlines()
        del lines[line]
        wrong = gpu_rehearse.missed(KINDS, 1, "\n".join(lines))
        assert f"the summary does not show the injected {kind}" in wrong


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("- PASS info", "- FAIL info", "nothing was injected into: FAIL info"),
        ("- PASS figures", "- SKIPPED (not proved) figures", "nothing was injected into: SKIPPED"),
        ("- FAIL parity", "- NOT REACHED parity", "nothing was injected into: NOT REACHED"),
        ("1 hung\n", "1 hung, 2 not reached\n", "not done: "),
    ],
)
def test_everything_else_must_be_done(old, new, said):
    (wrong,) = gpu_rehearse.missed(KINDS, 1, GOOD.replace(old, new))
    assert said in wrong


def test_a_failed_test_that_was_not_injected_is_one_too_many():
    more = GOOD.replace("- FAIL build", "- PASS build") + "- tests/ema/test_cpu.py::test_a: wrong\n"
    (wrong,) = gpu_rehearse.missed(KINDS[1:], 1, more)
    assert wrong == "4 tests failed, 3 of them injected"


def rehearsed(tmp_path, monkeypatch, code: str, inject=(), budget: float = 20.0) -> int:
    """A rehearsal of a command that does this."""
    monkeypatch.setattr(gpu_rehearse, "command_of", lambda options: [sys.executable, "-c", code])
    monkeypatch.delenv("OUT", raising=False)
    options = argparse.Namespace(inject=list(inject), carry=[], stage="gpu", budget=budget)
    return gpu_rehearse.rehearse(options, tree(tmp_path / "root"))


LEAVES = (
    "import os, pathlib, sys, tarfile\n"
    "out = pathlib.Path(os.environ['OUT'])\n"
    "(out / 'summary.md').write_text('# PASS: all')\n"
    "tarfile.open(out / 'results.tar.gz', 'w:gz').add(out / 'summary.md', 'summary.md')\n"
)


@pytest.mark.parametrize(
    ("code", "inject", "verdict", "said"),
    [
        (LEAVES + "print('# PASS: all')", (), 0, "PASS"),
        (LEAVES + "print('# PASS: all'); sys.exit(1)", (), 1, "the command exit status 1"),
        (LEAVES + "print('# PASS: all')", ("hang",), 1, "does not show the injected hang"),
        ("print('# PASS: all')", (), 1, "there is no summary.md"),
        (LEAVES, (), 1, "do not hold the whole summary"),
    ],
)
def test_a_rehearsal_can_fail(tmp_path, monkeypatch, capfd, code, inject, verdict, said):
    assert rehearsed(tmp_path, monkeypatch, code, inject) == verdict
    assert said in capfd.readouterr().out


def test_a_command_that_does_not_end_is_killed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu_rehearse, "KILLED_AFTER", 2.0)
    code = LEAVES + "import time; print('# PASS: all', flush=True); time.sleep(600)"
    assert rehearsed(tmp_path, monkeypatch, code) == 1
    assert "the command ended by SIGKILL" in capfd.readouterr().out


@pytest.mark.parametrize("namespaces", [True, False])
def test_a_rehearsal_has_no_network(tmp_path, monkeypatch, capfd, namespaces):
    """Also where the system gives no namespace without one."""
    if not namespaces:
        monkeypatch.setattr(gpu_rehearse.shutil, "which", lambda name: None)
    code = (
        "import socket\n"
        "try: socket.create_connection(('192.0.2.1', 80), timeout=5); print('connected')\n"
        "except TimeoutError: print('it tried')\n"
        "except OSError as error: print('refused', error)\n"
    )
    rehearsed(tmp_path, monkeypatch, code)
    assert "refused" in capfd.readouterr().out


def test_the_command_gets_what_was_asked_for():
    words = ["check", "--rehearse", "--ops", "ema", "--tests", "tests/test_a.py", "--budget", "99"]
    command = gpu_rehearse.command_of(gpu.parse(words))
    options = gpu.parse(command[command.index("bench.gpu") + 1 :])
    assert (options.stage, options.device, options.budget) == ("check", "cpu", 99)
    assert (options.ops, options.rehearse) == (["ema"], False)
    assert options.tests == ["tests/test_a.py", gpu_rehearse.REHEARSED]
