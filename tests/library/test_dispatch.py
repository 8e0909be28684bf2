"""Which backend runs: the choice, the override, the report, the libraries' absence."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from vicreg_kernels import configs, variance_covariance, vicreg_loss
from vicreg_kernels.core import dispatch, library, loader, registry

IMPORTED = """
import sys, vicreg_kernels
print(*(name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules))
"""
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
    for op in ("vicreg", "barlow"):
        assert dispatch.choose(op, None, "cuda", dtype, 10**6) == "cuda", "nothing is measured"


GPU = torch.device("cuda", 1)


@pytest.fixture
def measured_gpu(everything_built, monkeypatch, tmp_path):
    """GPU is there and has a file: vicreg's half threshold is 512, barlow has none."""
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    names = {0: "Another GPU", 1: "Some GPU"}
    monkeypatch.setattr(
        dispatch, "_gpu", lambda index: (1, names[1]) if index is None else (index, names[index])
    )
    record = configs.empty("Some GPU")
    record["triton_from"] = {"vicreg": {"half": 512, "single": None}}
    configs.write(configs.path_of("Some GPU"), record)
    yield record
    monkeypatch.undo()
    configs.forget()


@pytest.mark.parametrize("device", [GPU, "cuda"])
def test_a_measured_threshold_chooses_triton_from_there_on(measured_gpu, device):
    for dtype in (torch.bfloat16, torch.float16):
        assert dispatch.choose("vicreg", None, device, dtype, 511) == "cuda"
        assert dispatch.choose("vicreg", None, device, dtype, 512) == "triton"
    assert dispatch.choose("vicreg", None, device, torch.float32, 10**6) == "cuda", "it never won"
    assert dispatch.choose("barlow", None, device, torch.bfloat16, 10**6) == "cuda"
    other = torch.device("cuda", 0)
    assert dispatch.choose("vicreg", None, other, torch.bfloat16, 10**6) == "cuda"
    assert dispatch.choose("vicreg", "cuda", device, torch.bfloat16, 10**6) == "cuda"


def test_a_threshold_gives_way_where_triton_is_missing(measured_gpu, monkeypatch):
    monkeypatch.setattr(library, "TRITON_MISSING", "not installed")
    assert dispatch.choose("vicreg", None, GPU, torch.bfloat16, 4096) == "cuda"


def test_the_threshold_is_read_once_a_device(measured_gpu, monkeypatch):
    assert dispatch.choose("vicreg", None, GPU, torch.bfloat16, 4096) == "triton"
    assert dispatch.choose("barlow", None, GPU, torch.bfloat16, 4096) == "cuda"

    def asked(*_):
        raise AssertionError("a call asks again")

    monkeypatch.setattr(configs, "load", asked)
    monkeypatch.setattr(dispatch, "_gpu", asked)
    assert dispatch.choose("vicreg", None, GPU, torch.bfloat16, 4096) == "triton"
    assert dispatch.choose("barlow", None, GPU, torch.bfloat16, 4096) == "cuda"


def test_a_written_file_counts_at_once(measured_gpu):
    assert dispatch.choose("vicreg", None, GPU, torch.bfloat16, 100) == "cuda"
    measured_gpu["triton_from"]["vicreg"]["half"] = 100
    configs.write(configs.path_of("Some GPU"), measured_gpu)
    assert dispatch.choose("vicreg", None, GPU, torch.bfloat16, 100) == "triton"


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_threshold_is_part_of_a_compiled_graph(measured_gpu, dynamic):
    """The choice alone, since there may be no GPU: what it gives is a constant of the graph."""

    def named(x):
        side = min(x.shape)
        return x + len(dispatch.choose("vicreg", None, GPU, torch.bfloat16, side))

    run = torch.compile(named, fullgraph=True, dynamic=dynamic, backend="eager")
    for rows, name in ((64, "cuda"), (512, "triton"), (4096, "triton")):
        assert run(torch.zeros(rows, 4100))[0, 0] == len(name)


def test_every_op_says_what_its_choice_depends_on(measured_gpu):
    def choices(op, dtype=torch.bfloat16):
        return registry.choices(op, GPU, dtype)

    assert choices("vicreg") == [(0, "cuda"), (512, "triton")]
    assert choices("vicreg", torch.float32) == [(0, "cuda")]
    assert choices("barlow") == [(0, "cuda")]
    assert choices("attention") == [(0, "cuda"), (257, "triton")]
    assert choices("attention", torch.float32) == [(0, "triton")]
    assert registry.choices("vicreg", torch.device("cpu"), torch.bfloat16) == [(0, "cpu")]


T = 4  # tokens


def _calls():
    """op as it is registered -> calls on CPU tensors, (size that the choice depends on, call)."""
    import vicreg_kernels as vk

    def views(*shape):
        return torch.randn(shape), torch.randn(shape)

    def attend(tokens, dtype=torch.bfloat16):
        q = torch.randn(1, 1, tokens, 16).to(dtype)
        return vk.masked_attention(q, q, q)

    x, index = torch.randn(2, T, 8), torch.arange(2).expand(2, 2)
    maps, grids = list(views(3, 4, 6)), list(views(3, 4, 2))
    rope = vk.Rope3d((1, 2, 2))

    def frames(dim, count):
        return [torch.randn(2, T, dim), *(torch.randn(2, dim) for _ in range(count - 1))]

    return {
        "vicreg": [
            (8, lambda: vicreg_loss(*views(8, 16))),
            (600, lambda: variance_covariance(torch.randn(600, 601))),
        ],
        "barlow": [
            (8, lambda: vk.barlow_twins_loss(*views(16, 8))),
            (600, lambda: vk.barlow_twins_loss(*views(601, 600))),
        ],
        "sigreg": [(0, lambda: vk.sigreg_loss(torch.randn(8, 16), step=1))],
        "sigreg_directions": [(0, lambda: vk.sigreg_directions(16, 4, step=1))],
        "vicregl": [
            (0, lambda: vk.vicregl_loss(list(views(3, 6)), maps, grids, num_matches=(2, 1)))
        ],
        "attention": [
            *((n, lambda n=n: attend(n)) for n in (T, 256, 257, 300)),
            (T, lambda: attend(T, torch.float32)),
        ],
        "rope": [(0, lambda: vk.apply_rope(torch.randn(1, 1, T, 16), rope))],
        "tokens": [
            (0, lambda: vk.gather_tokens(x, index)),
            (0, lambda: vk.scatter_tokens(x[:, :2], index, T)),
            (0, lambda: vk.prediction_loss(x[:, :2], x, index)),
            (0, lambda: vk.assemble_tokens(x[:, :2], index, torch.randn(8), index + 2)),
        ],
        "ema_update_": [(0, lambda: vk.ema_update_([torch.ones(3)], [torch.ones(3)], 0.9))],
        "adaln": [
            *((n, lambda n=n: vk.modulated_layer_norm(*frames(n, 3))) for n in (8, 4096, 4097))
        ],
        "gated_residual": [(0, lambda: vk.gated_residual(x, *frames(8, 2)))],
    }


def test_every_name_has_a_call():
    """A new op's names come into _calls too."""
    assert sorted(registry.names().keys() - _calls().keys()) == []


@pytest.mark.parametrize("op", registry.names())
def test_the_report_and_the_op_choose_alike(measured_gpu, monkeypatch, op):
    """What an op asks `choose` in a call, asked again for a GPU, is what `choices` says of it."""
    measured_gpu["triton_from"]["barlow"] = {"half": 300}
    configs.write(configs.path_of("Some GPU"), measured_gpu)
    real, asked = dispatch.choose, []

    def choose(op, backend, device, dtype, side=None, cannot_run=None):
        asked.append((op, dtype, side, cannot_run))
        return "reference"

    monkeypatch.setattr(dispatch, "choose", choose)
    recorded = []
    for size, call in _calls()[op]:
        asked.clear()
        call()
        recorded.append((size, [a for a in asked if a[0] == op]))
        assert {a[0] for a in asked} <= registry.names().keys(), "an op that info leaves out"
    monkeypatch.setattr(dispatch, "choose", real)
    for size, each in recorded:
        assert each, "the op did not ask"
        for _, dtype, side, cannot_run in each:
            for wanted in (dtype, torch.bfloat16):
                if cannot_run and wanted != dtype:
                    continue  # what does not fit depends on the dtype
                name = real(op, None, GPU, wanted, side, cannot_run)
                at = [b for least, b in registry.choices(op, GPU, wanted) if least <= size]
                assert name == at[-1], (op, size, wanted)


def test_what_is_missing_is_passed_over(everything_built, monkeypatch):
    monkeypatch.setattr(library, "CUDA_MISSING", "not built")
    assert dispatch.choose("vicreg", None, "cuda", torch.float32, 64) == "triton"
    monkeypatch.setattr(library, "TRITON_MISSING", "not installed")
    assert dispatch.choose("vicreg", None, "cuda", torch.float32, 64) == "reference"
    monkeypatch.setattr(library, "CPU_MISSING", "not built")
    assert dispatch.choose("vicreg", None, "cpu", torch.float32, 64) == "reference"


def test_a_backend_that_does_not_take_the_call(everything_built):
    cannot_run = {"cuda": "at most 256 keys"}
    assert (
        dispatch.choose("attention", None, "cuda", torch.float32, cannot_run=cannot_run) == "triton"
    )
    with pytest.raises(RuntimeError, match=r"cannot run attention.*at most 256 keys"):
        dispatch.choose("attention", "cuda", "cuda", torch.float32, cannot_run=cannot_run)


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

    def load(op, kind, name):
        loaded.append(name)
        raise Stop

    monkeypatch.setattr(loader, "load", load)
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


def test_the_import_brings_no_compiler_along():
    """torch's takes longer to import than all of this package, and most calls never compile."""
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_constants_of_graphs_are_marked_as_torch_marks_them():
    def ours(): ...
    def theirs(): ...  # fmt: skip

    assert vars(library.constant_in_graphs(ours)) == vars(
        torch.compiler.assume_constant_result(theirs)
    )
