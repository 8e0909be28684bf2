"""`vicreg-kernels info | bench | audit | report`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vicreg_kernels import cli, configs
from vicreg_kernels.core import dispatch, library, registry

ROOT = Path(__file__).resolve().parents[2]


def test_info_says_which_backend_runs(capsys):
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["torch"] == torch.__version__
    assert info["devices"][0] == "cpu"
    by_dtype = info["backends"]["vicreg"]["cpu"]
    assert by_dtype["float64"] == "reference"
    assert by_dtype["float32"] == dispatch.choose("vicreg", None, "cpu", torch.float32)
    assert info["libraries"]["_C (cpu)"] == (library.CPU_MISSING or "loaded")
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


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Two kinds of GPU are seen, everything is built; the second kind has a measured threshold."""
    names = ["Plain GPU", "Plain GPU", "Some GPU"]
    for name in ("CPU_MISSING", "CUDA_MISSING", "TRITON_MISSING"):
        monkeypatch.setattr(library, name, None)
    for owner, name, value in (
        (dispatch, "_INTERPRETING", False),
        (configs, "FOLDER", tmp_path),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: len(names)),
        (torch.cuda, "get_device_name", lambda device: names[getattr(device, "index", device)]),
        (torch.cuda, "get_device_capability", lambda index: (9, 0)),
    ):
        monkeypatch.setattr(owner, name, value)
    record = configs.empty("Some GPU") | {"measured": {"date": "2026-01-02"}}
    record["triton_from"] = {"vicreg": {"half": 4096}}
    configs.write(configs.path_of("Some GPU"), record)
    yield names
    monkeypatch.undo()
    configs.forget()


def test_info_asks_each_op_for_each_kind_of_gpu(gpus, capsys):
    info = cli.info()
    backends = info["backends"]
    assert backends.keys() == registry.names().keys()
    assert backends["vicreg"].keys() == {"cpu", "cuda:0", "cuda:2"}
    assert backends["vicreg"]["cuda:0"]["bfloat16"] == "cuda"
    assert backends["vicreg"]["cuda:2"]["bfloat16"] == "cuda; triton where min(N, D) >= 4096"
    assert backends["vicreg"]["cuda:2"]["float32"] == "cuda"
    assert backends["barlow"]["cuda:2"]["bfloat16"] == "cuda"
    longest = "cuda; triton where the longest sample's tokens >= 257"
    assert backends["attention"]["cuda:0"]["float16"] == longest
    assert backends["attention"]["cuda:0"]["float32"] == "triton"
    for op in ("ema_update_", "tokens", "rope", "vicregl", "sigreg", "sigreg_directions"):
        assert backends[op]["cuda:0"]["float32"] == "cuda"
        assert backends[op]["cuda:0"]["float64"] == "reference"
    assert info["configurations"]["cuda:0"].startswith("general ones")
    assert info["configurations"]["cuda:2"].startswith("measured 2026-01-02: ")
    gpus[:] = ["Some GPU"]
    configs.forget()
    assert cli.info()["backends"]["vicreg"].keys() == {"cpu", "cuda"}, "one kind needs no number"
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"vicreg +cuda +bfloat16 +cuda; triton where min\(N, D\) >= 4096\n", text)
    assert re.search(r"cuda +measured 2026-01-02", text)


@pytest.mark.parametrize("command", ["bench", "audit", "report"])
def test_commands_of_a_checkout_say_when_there_is_none(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    assert cli.main([command]) == 2
    assert "source checkout" in capsys.readouterr().err


def test_commands_pass_their_options_on(monkeypatch):
    ran = []

    def fake(command, cwd, env):
        ran.append(command[1:])
        assert cwd is None, "the paths that a command is given are the caller's"
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str(cli.CHECKOUT)
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(cli.subprocess, "run", fake)
    assert cli.main(["bench"]) == 5
    cli.main(["bench", "--cases", "64x8192"])
    cli.main(["bench", "--op", "vicreg", "--tune", "--seconds", "60"])
    cli.main(["report", "some.json", "--figure", "x.png"])
    cli.main(["report", "a", "b", "--output", "report.html", "--csv", "all.csv"])
    assert ran == [
        ["-m", "bench.run", "--quick"],
        ["-m", "bench.run", "--cases", "64x8192"],
        ["-m", "bench.tune", "--op", "vicreg", "--seconds", "60"],
        ["-m", "bench.report", "some.json", "--figure", "x.png"],
        ["-m", "bench.report", "a", "b", "--output", "report.html", "--csv", "all.csv"],
    ]
    with pytest.raises(SystemExit):
        cli.main(["info", "--surplus"])


def test_the_report_takes_the_callers_paths(tmp_path):
    """Also where the caller's folder has a `bench` of its own."""
    (tmp_path / "bench.py").write_text("raise SystemExit('the wrong one')\n")
    records = ROOT / "bench" / "results" / "cpu-amd-epyc-2-cores" / "ema.json"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ema.json").write_text(records.read_text())
    command = [sys.executable, "-m", "vicreg_kernels.cli", "report", "mine", "--csv", "all.csv"]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if sys.version_info >= (3, 11):
        subprocess.run(command, cwd=tmp_path, env=os.environ | paths, check=True)
        assert (tmp_path / "all.csv").read_text().count("\n") == 8


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "vicreg_kernels.cli", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == cli.__version__
