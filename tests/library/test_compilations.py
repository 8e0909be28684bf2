"""What the tests marked `gpu` compile with Triton: few kernels, each test some, counted rightly.

A compilation takes 0.1 to 2.6 CPU-seconds. The recording (compilations.py) needs no GPU. All tests
together may compile 500 kernels; they compile 498. Nearly each of them is one dtype, one layout or
one rule of one kernel: in attention a head dim, or one of the rules that stay constants because
their loops differ; in vicreg and barlow the side, the views and the layout; in adaln the width of a
block. A new test takes the heads, the dims and the layouts of the others, or leaves Triton to them
(`triton_takes` in conftest.py). The recording also refuses what a GPU would: tensors of two devices
in one operation or comparison.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.compilations import OPS, files_with_gpu_tests

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
# Compilations that an op's kernels may need, whichever test launches them: as many as were counted.
# To be lowered as kernels specialise on less and tests draw less.
MOST = {
    "adaln": 48,
    "attention": 117,
    "barlow": 70,
    "core": 1,  # the sum of partial losses, which ops share
    "ema": 34,
    "sigreg": 50,
    "tokens": 57,
    "vicreg": 89,
    "vicregl": 32,
}
MOST_IN_ALL = 500
# Tests that take the Triton backend and need not launch a kernel: what they give is refused before,
# empty, or the reference's; those of ema_torch leave the backend to the library: it takes CUDA's.
REFUSED = (
    "ema/test_bad_input.py",
    "test_fullgraph_of_the_reference",
    "test_no_token_at_all",
    "attention/test_torch.py::test_module_copies_and_pickles",
    "barlow/test_torch.py::test_fullgraph_equals_eager[triton-reference",
    "ema/test_torch.py::test_a_schedule_of_tensors_compiles_once",
    "ema/test_torch.py::test_checks_that_a_graph_cannot_make_are_made_at_run_time",
    "ema/test_torch.py::test_numbers_that_change_under_compile",
    "ema/test_torch.py::test_the_modules_update_in_one_graph",
)
# Tests that the recording cannot carry to their end, and why: each for what the pretended GPU is.
LOST = {
    "tokens/test_torch.py::test_fake_tensors[triton": "no weak reference to a pretended device",
    "vicregl/test_gpu.py::test_indices_out_of_range": "follows an index that a kernel should give",
    "sigreg/test_torch.py::test_modules_copy_and_pickle": "pickles a tensor's storage",
    "attention/test_torch.py::test_jagged_nested_tensors": "no nested tensors of pretended ones",
    "attention/test_torch.py::test_tables_of_angles_are_kept": "counts what FakeTensorMode makes",
    "ema/test_changes.py::test_a_change_that_fits[triton-set_storage]": "sets a tensor's storage",
    "ema/test_changes.py::test_a_mistake_in_a_later_call[triton-another_device]": "meta is the GPU",
}


def record(directory: Path, name: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """compilations.py in a process of its own."""
    file = directory / f"{name}.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.compilations", "--record", str(file), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> dict[str, Any]:
    """The whole gpu suite, in about a minute."""
    return record(tmp_path_factory.mktemp("compilations"), "all", *files_with_gpu_tests())


@pytest.mark.thorough
def test_the_gpu_suite_compiles_few_kernels(recorded):
    used = set().union(*map(set, recorded["launches"].values()))
    ops = Counter(recorded["made"][key]["module"].split(".")[1] for key in used)
    assert set(ops) == set(MOST) >= set(OPS)
    assert {op: n for op, n in ops.items() if n > MOST[op]} == {}
    assert sum(ops.values()) <= MOST_IN_ALL, ops


@pytest.mark.thorough
def test_every_triton_test_launches_a_kernel(recorded):
    """Else the recording missed its launches: the number above would be too small."""
    assert len(recorded["triton"]) > 500
    still = [
        test
        for test in recorded["triton"]
        if not recorded["launches"].get(test)
        and recorded["outcomes"].get(test) != "skipped"
        and not any(name in test for name in (*REFUSED, *LOST))
    ]
    assert still == []


@pytest.mark.thorough
def test_every_test_runs_to_its_end(recorded):
    failed = {test for test, outcome in recorded["outcomes"].items() if outcome == "failed"}
    lost = {test for test in failed if any(name in test for name in LOST)}
    assert {test: recorded["errors"][test] for test in failed - lost} == {}


def test_what_is_counted_is_what_triton_compiles(tmp_path):
    """Triton's own compiler, run on what was recorded, leaves as many kernels in its cache."""
    test = "test_real_shapes_match_the_reference[triton-2048x512x1024x17-torch.bfloat16]"
    cache = tmp_path / "cache"
    given = ("--compile", f"tests/sigreg/test_gpu.py::{test}")
    recording = record(tmp_path, "one", *given, TRITON_CACHE_DIR=str(cache))
    assert recording["outcomes"] == {f"tests/sigreg/test_gpu.py::{test}": "passed"}
    (keys,) = recording["launches"].values()
    kernels = Counter(path.stem for path in cache.rglob("*.cubin"))
    assert kernels == Counter(recording["made"][key]["kernel"] for key in keys)
    assert len(kernels) >= 3


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


DEVICES = """
import sys
import torch
from tests.helpers import pretended_gpu
pretended_gpu.install()
here, there = torch.zeros(3), torch.zeros(3, device="cuda")
both = here, there
there.copy_(here), there[torch.tensor([1])], there + torch.tensor(1.0), there.mul_(2.0)
assert torch.equal(there, here.cuda())
refused = 0
for mixed in (torch.equal, torch.add, torch.lerp, torch.testing.assert_close):
    try:
        mixed(*both, 0.5) if mixed is torch.lerp else mixed(*both)
    except pretended_gpu.DevicesDiffer:
        refused += 1
print(refused)
"""


def test_tensors_of_two_devices_are_refused():
    """As on a GPU, where a test that mixes them would fail."""
    done = python(DEVICES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["4"]


KEYS = """
import sys
import torch
from tests.helpers import compilations, pretended_gpu
import triton, triton.language as tl
from triton.runtime.jit import JITFunction

pretended, keys = compilations.Recording(), []
compilations.record_compilations(pretended)
recorded = JITFunction._do_compile

def noting(self, key, *rest):
    keys.append(key)
    return recorded(self, key, *rest)

JITFunction._do_compile = noting
kernel = triton.jit(compilations.example)

def launch(device):
    keys.clear()
    base = torch.zeros(64, 32, device=device)
    for x in (base, base[1:], base[:, 1:], base.t(), base.half(), base[:0]):
        for n in (1, 7, 16, 2**31, 2**40 + 1):
            kernel[(1,)](x, x.stride(0), n, 0.5, BLOCK=16, num_warps=4)
            kernel.device_caches.clear()
    return list(keys)

real = launch("cpu")
pretended_gpu.install()
assert launch("cuda") == real and len(set(real)) >= 15
print(len(real), len(set(real)))
"""


def test_a_pretended_tensor_has_the_key_of_a_real_one():
    """Dtype, strides, an address that is aligned or not, empty, and integers of every kind."""
    done = python(KEYS)
    assert done.returncode == 0, done.stderr[-3000:]
    count, different = map(int, done.stdout.split())
    assert count == 30
    assert different >= 15


def test_what_is_left_out_is_tritons_alone():
    """`triton_takes` takes no test from another backend."""
    from tests import conftest

    class Item:
        def __init__(self, **parameters: Any) -> None:
            self.callspec = type("Callspec", (), {"params": parameters})

        def iter_markers(self, name: str) -> list[Any]:
            assert name == "triton_takes"
            return [pytest.mark.triton_takes(lambda n, **_: n < 3).mark]

    triton, cuda = conftest.Fused("triton", "cuda"), conftest.Fused("cuda", "cuda")
    assert [conftest.compiled_for(Item(fused=triton, n=n)) for n in (2, 3)] == [True, False]
    assert conftest.compiled_for(Item(backend="triton", n=2))
    assert not conftest.compiled_for(Item(backend="triton", n=3))
    assert conftest.compiled_for(Item(fused=cuda, n=3))
    assert conftest.compiled_for(Item(n=3))
