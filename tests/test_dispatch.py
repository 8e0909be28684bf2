"""Which backend runs: the choice, the override, the report, the libraries' absence."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from vicreg_kernels import dispatch, library, variance_covariance, vicreg_loss
from vicreg_kernels.vicreg import backends

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def everything_built(monkeypatch):
    for name in ("CPU_MISSING", "CUDA_MISSING", "TRITON_MISSING"):
        monkeypatch.setattr(library, name, None)
    monkeypatch.setattr(dispatch, "ENVIRONMENT_BACKEND", None)
    monkeypatch.setattr(dispatch, "_INTERPRETING", False)


@pytest.mark.parametrize("dtype", FLOATS)
def test_best_for_the_device_and_shape(everything_built, dtype):
    assert dispatch.choose("vicreg", None, "cpu", dtype, 64) == "cpu"
    assert dispatch.choose("vicreg", None, "cuda", dtype, 64) == "cuda"
    assert dispatch.choose("vicreg", None, "cuda", dtype) == "cuda"
    edge = dispatch.TRIANGULAR_FROM
    assert dispatch.choose("vicreg", None, "cuda", dtype, edge) == "cuda"
    assert dispatch.choose("vicreg", None, "cuda", dtype, edge + 1) == "triton"


def test_what_is_missing_is_passed_over(everything_built, monkeypatch):
    monkeypatch.setattr(library, "CUDA_MISSING", "not built")
    assert dispatch.choose("vicreg", None, "cuda", torch.float32, 64) == "triton"
    monkeypatch.setattr(library, "TRITON_MISSING", "not installed")
    assert dispatch.choose("vicreg", None, "cuda", torch.float32, 64) == "reference"
    monkeypatch.setattr(library, "CPU_MISSING", "not built")
    assert dispatch.choose("vicreg", None, "cpu", torch.float32, 64) == "reference"


def test_a_backend_that_does_not_take_the_call(everything_built):
    unfit = {"cuda": "at most 256 keys"}
    assert dispatch.choose("attention", None, "cuda", torch.float32, unfit=unfit) == "triton"
    with pytest.raises(RuntimeError, match=r"cannot run attention.*at most 256 keys"):
        dispatch.choose("attention", "cuda", "cuda", torch.float32, unfit=unfit)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_float64_runs_on_the_reference(everything_built, device):
    assert dispatch.choose("vicreg", None, device, torch.float64, 64) == "reference"
    for name in ("cpu", "triton", "cuda"):
        with pytest.raises(RuntimeError, match="float64 runs on 'reference'"):
            dispatch.choose("vicreg", name, device, torch.float64, 64)


@pytest.mark.parametrize(
    ("name", "device"), [("cpu", "cuda"), ("triton", "cpu"), ("cuda", "cpu"), ("cpu", "meta")]
)
def test_a_named_backend_on_the_wrong_device(everything_built, name, device):
    with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run vicreg.*not {device}"):
        dispatch.choose("vicreg", name, device, torch.float32, 64)


@pytest.mark.parametrize(
    ("name", "attribute", "device"),
    [
        ("cpu", "CPU_MISSING", "cpu"),
        ("cuda", "CUDA_MISSING", "cuda"),
        ("triton", "TRITON_MISSING", "cuda"),
    ],
)
def test_the_reason_a_library_is_missing_is_told(
    everything_built, monkeypatch, name, attribute, device
):
    monkeypatch.setattr(library, attribute, "the disk was full")
    assert dispatch.missing(name, device, torch.float32) == "the disk was full"
    with pytest.raises(RuntimeError, match="the disk was full"):
        dispatch.choose("vicreg", name, device, torch.float32)


def test_the_reference_is_never_missing(everything_built):
    for dtype in (*FLOATS, torch.float64):
        for device in ("cpu", "cuda", "meta"):
            assert dispatch.missing("reference", device, dtype) is None
            assert dispatch.choose("vicreg", "reference", device, dtype) == "reference"


def test_unknown_names(everything_built, monkeypatch):
    with pytest.raises(ValueError, match="backend: got 'gpu', takes one of"):
        dispatch.choose("vicreg", "gpu", "cpu", torch.float32)
    monkeypatch.setattr(dispatch, "ENVIRONMENT_BACKEND", "gpu")
    with pytest.raises(ValueError, match="'gpu', takes one of"):
        dispatch.choose("vicreg", None, "cpu", torch.float32)


def test_a_library_that_is_not_there():
    reason = library._load("_no_such_library")
    assert reason is not None
    assert "_no_such_library.abi3.so" in reason


def test_a_library_that_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "_broken.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "_PACKAGE", tmp_path)
    reason = library._load("_broken")
    assert reason is not None
    assert "did not load" in reason
    assert "_broken.abi3.so" in reason


def test_the_call_runs_what_was_named(monkeypatch):
    """The name given reaches the kernels; the reference reaches none."""
    loaded = []
    monkeypatch.setattr(library, "CPU_MISSING", None)

    class Stop(Exception):
        pass

    def load(name):
        loaded.append(name)
        raise Stop

    monkeypatch.setattr(backends, "load", load)
    x = torch.randn(4, 3)
    for call in (
        lambda b: vicreg_loss(x, x, backend=b),
        lambda b: variance_covariance(x, backend=b),
    ):
        with pytest.raises(Stop):
            call("cpu")
        call("reference")
    assert loaded == ["cpu", "cpu"]


def test_debug_log(caplog):
    x = torch.randn(4, 3)
    with caplog.at_level(logging.DEBUG, logger="vicreg_kernels"):
        vicreg_loss(x, x, backend="reference")
        vicreg_loss(x.double(), x.double())
    named, chosen = (record.getMessage() for record in caplog.records)
    for word in ("vicreg", "(1, 4, 3)", "cpu", "reference", "backend='reference'"):
        assert word in named
    assert "reference" in chosen
    assert "best for the device and shape" in chosen
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="vicreg_kernels"):
        vicreg_loss(x, x)
    assert not caplog.records


ASK = """
import logging, sys, torch
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(name)s %(message)s")
from vicreg_kernels import vicreg_loss
x = torch.randn(4, 3)
try:
    vicreg_loss(x, x, backend=sys.argv[1] if len(sys.argv) > 1 else None)
except Exception as error:
    print(type(error).__name__, error)
"""


def ask(environment, *args):
    env = {k: v for k, v in os.environ.items() if k != "VICREG_KERNELS_BACKEND"}
    if environment is not None:
        env["VICREG_KERNELS_BACKEND"] = environment
    done = subprocess.run(
        [sys.executable, "-c", ASK, *args], env=env, check=True, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if "vicreg" in line.lower()]
    return lines[-1]


def test_environment_takes_the_place_of_none():
    said = ask("reference")
    assert ": reference (" in said
    assert "VICREG_KERNELS_BACKEND" in said, "the log says why: the environment, not the shape"


def test_environment_names_an_unknown_backend():
    said = ask("gpu")
    assert said.startswith("ValueError")
    assert "VICREG_KERNELS_BACKEND" in said


def test_the_argument_beats_the_environment(everything_built, monkeypatch):
    monkeypatch.setattr(dispatch, "ENVIRONMENT_BACKEND", "cuda")
    assert dispatch.choose("vicreg", "reference", "cpu", torch.float32) == "reference"
    assert dispatch.choose("vicreg", None, "cuda", torch.float32, 10**6) == "cuda"


def test_environment_names_a_backend_that_cannot_run(everything_built, monkeypatch):
    monkeypatch.setattr(dispatch, "ENVIRONMENT_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"VICREG_KERNELS_BACKEND.*cannot run vicreg here"):
        dispatch.choose("vicreg", None, "cpu", torch.float32)
