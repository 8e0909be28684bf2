"""Tests marked `interpreted` run in a second process and are reported under their own names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import triton_interpreter

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    triton_interpreter.INTERPRETING, reason="is about a process without the interpreter"
)
ROOT = Path(__file__).resolve().parents[2]

CONFTEST = """
from tests.helpers import triton_interpreter

def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted: in the second process")
    config.pluginmanager.register(triton_interpreter, "triton interpreter")
"""
TESTS = """
import os, pytest

def interprets():
    return os.environ.get("TRITON_INTERPRET") == "1"

@pytest.fixture(scope="module")
def kept():
    yield
    print("torn down")

def test_here(kept):
    assert not interprets()

@pytest.mark.interpreted
class TestThere:
    @pytest.mark.parametrize("word", ["a b", "c"])
    def test_good(self, kept, word):
        assert interprets()

    def test_wrong(self):
        assert 1 == 2, "a reason to be read"

    def test_skipped(self):
        pytest.skip("not today")

    @pytest.mark.skip(reason="never")
    def test_never(self):
        raise AssertionError
"""
DYING = """
import os, pytest

@pytest.mark.interpreted
def test_good():
    pass

@pytest.mark.interpreted
def test_dies():
    os._exit(7)

@pytest.mark.interpreted
def test_later():
    pass
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "--rootdir", str(folder), *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_one.py").write_text(TESTS)
    (tmp_path / "test_two.py").write_text("def test_after():\n    pass\n")
    return tmp_path


def test_each_has_its_own_outcome(folder):
    text = run(folder).stdout
    assert "4 passed, 2 skipped" in text.replace("1 failed, ", "")
    assert "1 failed" in text
    assert "PASSED test_one.py::TestThere::test_good[a b]" in text
    assert "FAILED test_one.py::TestThere::test_wrong - AssertionError: a reason to be read" in text
    assert "not today" in text


@pytest.mark.parametrize("word", ["test_one.py::TestThere::test_good[c]", "-kgood and c"])
def test_one_is_selected_by_its_name(folder, word):
    done = run(folder, word)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_a_process_that_dies_fails_those_it_did_not_end(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_one.py").write_text(DYING)
    text = run(tmp_path).stdout
    assert "2 failed, 1 passed" in text
    assert "the interpreting process ended with 7 before this test did" in text


@pytest.mark.thorough
def test_a_test_of_an_op_runs_by_its_node_id():
    test = "tests/ema/test_triton.py::TestInterpreter::test_without_shadows_and_with_empty_tensors"
    done = run(ROOT, test)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
