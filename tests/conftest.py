"""What every test file shares: poisoned memory, seeds, the fused backends, the `gpu` marker."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read once, when torch and vicreg_kernels load. Threads that spin while they wait make the suite
# several times slower on a machine that has other work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.pop("VICREG_KERNELS_BACKEND", None)

import pytest
import torch
from hypothesis import settings

from tests.helpers import audit_triton, triton_interpreter
from vicreg_kernels.core import dispatch

# The same examples every time: a red run is a change in the code, not in the draw.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")


# The files that take longest, longest first. With xdist a file goes to one worker as a whole: these
# in this order, then the others (`--no-loadscope-reorder`), so that none of these is begun when the
# other worker is about to end.
LONGEST = (
    "trainer/test_ranks.py",
    "attention/test_triton.py",
    "bench/test_gpu_rehearsal.py",
    "trainer/test_world_commands.py",
    "bench/test_gpu_parity.py",
    "trainer/test_demo.py",
    "trainer/test_curves.py",
    "vicreg/test_ranks.py",
    "tokens/test_triton.py",
    "sigreg/test_triton.py",
    "vicreg/test_torch.py",
    "attention/test_emulator.py",
    "vicreg/test_triton.py",
    "barlow/test_triton.py",
    "vicreg/test_triton_tma.py",
    "library/test_compilations.py",
    "library/test_distributed.py",
    "bench/test_bench.py",
)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(triton_interpreter, "triton interpreter")
    for marker in (
        "gpu: needs an NVIDIA GPU",
        "interpreted: a Triton kernel's numerics, run under TRITON_INTERPRET=1",
        "gpu_memory: takes gigabytes of a GPU's memory, or measures it: no other test beside it",
        "triton_takes(which): of the parameters, those that Triton compiles kernels for",
        "sampled(n): of its parameters all but each nth are thorough",
    ):
        config.addinivalue_line("markers", marker)


def compiled_for(item: pytest.Item) -> bool:
    """False: a test of the Triton backend on a GPU that its `triton_takes` leaves to the others.

    Triton compiles a kernel for each mix of dtypes, layouts and divisible sizes, a second each:
    where a test draws hundreds of mixes, the C++ backends, which compile none, take them all.
    """
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    backend = parameters.get("fused", parameters.get("backend"))
    if getattr(backend, "name", backend) != "triton":
        return True
    which = [mark.args[0] for mark in item.iter_markers("triton_takes")]
    return all(takes(**parameters) for takes in which)


def mark_thorough(items: list[pytest.Item]) -> None:
    """Marks as thorough the audits, which only compile, and what `sampled` leaves out: of a test's
    draws all but each nth.
    """
    seen: Counter[str] = Counter()
    for item in items:
        if "_audit_" in item.path.name:
            item.add_marker(pytest.mark.thorough)
        mark = item.get_closest_marker("sampled")
        if mark is not None and item.get_closest_marker("thorough") is None:
            test = item.nodeid.split("[")[0]
            if seen[test] % mark.args[0]:
                item.add_marker(pytest.mark.thorough)
            seen[test] += 1


def begin_with_the_longest(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


# Marks before pytest itself selects by markers; orders after it has, by session-scoped parameters.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    mark_thorough(items)
    left = [item for item in items if not compiled_for(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if compiled_for(item)]
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if item.get_closest_marker("gpu") is not None:  # a folder called gpu is a keyword too
                item.add_marker(skip)
    yield
    if hasattr(config, "workerinput"):
        begin_with_the_longest(items)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN (integers: their maximum), so an element nobody wrote is seen.

    warn_only: the fill is wanted, not an error from an op that has no deterministic kernel.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@dataclass(frozen=True)
class Fused:
    """A fused backend and the device to run it on."""

    name: str
    device: str


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(Fused("cpu", "cpu"), id="cpu"),
        pytest.param(Fused("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
        pytest.param(Fused("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
    ],
)
def fused(request: pytest.FixtureRequest) -> Fused:
    """Each fused backend in turn. Under CI a missing CPU library is a failure, not a skip."""
    backend: Fused = request.param
    reason = dispatch.missing(backend.name, backend.device, torch.float32)
    if reason is None:
        return backend
    if backend.name == "cpu" and os.environ.get("CI"):
        pytest.fail(f"the cpu backend must be built here: {reason}")
    pytest.skip(f"{backend.name}: {reason}")


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of a GPU in turn, for tests that are marked gpu as a whole."""
    reason = dispatch.missing(request.param, "cuda", torch.float32)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """The cases of an audit, a file with CASES and launched, compiled by Triton."""
    pytest.importorskip("triton")
    return audit_triton.compile_all(request.module.launched, request.module.CASES)
