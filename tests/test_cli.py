"""`vicreg-kernels info | bench | audit | report`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vicreg_kernels import cli, dispatch, library

ROOT = Path(__file__).resolve().parents[1]


def test_info_says_which_backend_runs(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0] == "cpu"
    by_dtype = found["backends"]["vicreg"]["cpu"]
    assert by_dtype["float64"] == "reference"
    assert by_dtype["float32"] == dispatch.choose("vicreg", None, "cpu", torch.float32)
    assert found["libraries"]["_C (cpu)"] == (library.CPU_MISSING or "loaded")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^  vicreg +cpu +float32 +{by_dtype['float32']}$", text, re.MULTILINE)


def test_info_without_libraries_says_pure_python(monkeypatch, capsys):
    monkeypatch.setattr(library, "CPU_MISSING", "no compiler was there")
    monkeypatch.setattr(library, "CUDA_MISSING", "no nvcc was there")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "pure Python" in text
    assert "no compiler was there" in text
    assert re.search(r"vicreg +cpu +float32 +reference", text)


def test_info_names_the_environments_backend(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "ENVIRONMENT_BACKEND", "cuda")
    monkeypatch.setattr(library, "CUDA_MISSING", "no nvcc was there")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "VICREG_KERNELS_BACKEND=cuda" in text
    assert re.search(r"float32 +none: .*no nvcc was there", text)


@pytest.mark.parametrize("command", ["bench", "audit", "report"])
def test_commands_of_a_checkout_say_when_there_is_none(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    assert cli.main([command]) == 2
    assert "source checkout" in capsys.readouterr().err


def test_commands_pass_their_options_on(monkeypatch):
    ran = []

    def fake(command, cwd):
        ran.append(command[1:])
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(cli.subprocess, "run", fake)
    assert cli.main(["bench"]) == 5
    cli.main(["bench", "--cases", "64x8192"])
    cli.main(["report", "some.json", "--figure", "x.png"])
    assert ran == [
        ["-m", "bench.run", "--quick"],
        ["-m", "bench.run", "--cases", "64x8192"],
        ["-m", "bench.report", "some.json", "--figure", "x.png"],
    ]
    with pytest.raises(SystemExit):
        cli.main(["info", "--surplus"])


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "vicreg_kernels.cli", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == cli.__version__
