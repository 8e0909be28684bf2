"""Memory of attention: O(T d) beside the results, and nothing of T x T.

Two witnesses: what torch's allocator handed out, and the process's resident peak, which also sees
the C++ scratch.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.attention import cases
from vicreg_kernels.core import dispatch

MIB = 1 << 20
# float32 elements a thread keeps whatever the shape: tiles of queries, scores and gradients.
THREAD = 4 * (2 * 64 * 496 + 4 * 64 * 144)


@pytest.fixture
def cpu(fused):
    if fused.device != "cpu":
        pytest.skip("the CPU allocator's count; CUDA has its own test")
    return fused


def largest(call) -> tuple[int, int]:
    """(largest single allocation, running peak), in bytes, of a forward and a backward."""
    cotangent = torch.randn(call.q.shape)
    cases.run("cpu", call, cotangent)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        cases.run("cpu", call, cotangent)
    events = prof.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = highest = 0
    for _, size in memory:
        held += size
        highest = max(highest, held)
    return max(size for _, size in memory), highest


@pytest.mark.parametrize("rules", [(), ("frames",), ("ragged",), ("keep",), ("blocks",)])
@pytest.mark.parametrize("layout", ["heads", "tokens"])
def test_allocated_by_torch(cpu, rules, layout):
    """The output, its logarithms and three gradients: strided inputs earn no copy."""
    call = cases.draw(rules, batch=2, heads_=2, tokens=600, dim=16, layout=layout, axes=3)
    call = call.wanting(True, True, True)
    single, peak = largest(call)
    own = call.q.numel() * 4
    assert single <= own
    assert 4 * own <= peak <= 5 * own + (64 << 10)


RESIDENT = """
import re, sys, torch
sys.path.insert(0, ".")
from tests.attention import cases

torch.set_num_threads(2)

def resident():
    status = open("/proc/self/status").read()
    return int(re.search("VmHWM:\\\\s+(\\\\d+)", status)[1]) * 1024

tokens, heads, rules = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split()
def draw(tokens):
    call = cases.draw(rules, batch=1, heads_=heads, tokens=tokens, dim=16, tokens_per_frame=256)
    return call.wanting(True, True, True), torch.randn(call.q.shape)
cases.run(sys.argv[1], *draw(70))
ballast = torch.ones(64 << 20)  # what the imports once used does not hide part of the peak
call, cotangent = draw(tokens)
before = resident()
kept = cases.run(sys.argv[1], call, cotangent)
print(resident() - before)
"""


def grown(backend: str, tokens: int, heads: int, rules: str) -> int:
    command = [sys.executable, "-c", RESIDENT, backend, str(tokens), str(heads), rules]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("rules", ["", "frames"])
def test_resident_peak(cpu, rules):
    """Scratch is O(T d): results, packed keys and values a thread, and partial sums a task."""
    tokens, heads, dim, threads = 8192, 4, 16, 2
    rows = 4 * tokens * dim  # bytes of a head's tensor
    results = 4 * heads * rows
    packed = threads * 8 * rows  # of keys and values in three forms, of queries, and sums
    partial = 8 * heads * 2 * rows  # 32 tasks: 8 parts of each of 4 heads, dK and dV
    peak = grown(cpu.name, tokens, heads, rules)
    assert peak <= results + packed + partial + threads * THREAD + 8 * MIB
    assert peak < 4 * tokens * tokens // 4  # not a quarter of one matrix of scores


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_reference_breaks_the_limit(cpu):
    """The measure sees a matrix of scores."""
    assert grown("reference", 2048, 1, "") > 4 * 2048 * 2048


@pytest.mark.gpu
@pytest.mark.triton_takes(lambda rules, **_: rules == ("frames",))
@pytest.mark.parametrize("rules", [(), ("frames",), ("ragged",)])
def test_peak_on_cuda(fused, rules):
    if fused.device != "cuda":
        pytest.skip("CUDA's own count")
    call = cases.draw(
        rules, batch=2, heads_=4, tokens=2048, dim=64, dtype=torch.bfloat16, device="cuda"
    ).wanting(True, True, True)
    if cases.cannot_run(fused.name, call) or dispatch.missing(fused.name, "cuda", torch.bfloat16):
        pytest.skip("not for this backend")
    cotangent = torch.randn(call.q.shape).to(call.q)
    cases.run(fused.name, call, cotangent)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cases.run(fused.name, call, cotangent)
    own = call.q.numel() * call.q.element_size()
    # the results, and partial gradients in float32
    assert torch.cuda.max_memory_allocated() - before <= 12 * own + 8 * MIB
