"""Memory of the tokens ops: their results, two floats a row, and one row of scratch a thread.

The running peak of everything torch's allocator hands out in one forward and backward, the results
included, and the size of the largest allocation: no gathered copy of the teacher and no index of
[B, K, D] exists. A second witness is the process's resident peak.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.tokens.cases import draw, mask
from vicreg_kernels.tokens import assemble_tokens, gather_tokens, prediction_loss

ELEMENT = 4  # bytes of float32
CONSTANT = 1 << 14

# batch, tokens, kept, D
SHAPES = [(4, 64, 44, 640), (2, 300, 200, 256), (8, 32, 8, 1280)]


def allocations(function) -> list[int]:
    """Bytes of each allocation (positive) and release (negative) of a second run, in order."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = function()
    del kept
    events = prof.profiler.kineto_results.events()
    memory = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return [size for _, size in sorted(memory, key=lambda pair: pair[0])]


def peak(sizes: list[int]) -> int:
    held, highest = 0, 0
    for size in sizes:
        held += size
        highest = max(highest, held)
    return highest


@pytest.fixture
def cpu(fused):
    if fused.device != "cpu":
        pytest.skip("the CPU allocator's count; CUDA has its own test")
    return fused.name


def step(function, *leaves):
    return lambda: torch.autograd.grad(function(*leaves).sum(), leaves)


@pytest.mark.parametrize("kind", ["smooth_l1", "l1", "cosine"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss(cpu, shape, kind):
    """The gradient, B K D elements, and nothing else that is as long as the rows."""
    batch, tokens, kept, dim = shape
    pred, teacher = draw(batch, kept, dim), draw(batch, tokens, dim, grad=False)
    index = mask(batch, tokens, kept).index
    sizes = allocations(
        step(lambda p: prediction_loss(p, teacher, index, kind=kind, backend=cpu), pred)
    )
    whole = ELEMENT * batch * kept * dim
    assert whole <= peak(sizes) <= whole + 6 * ELEMENT * batch * kept + CONSTANT
    assert sorted(sizes)[-2] < whole / 8, "two allocations as long as the rows"


@pytest.mark.parametrize("shape", SHAPES)
def test_gather(cpu, shape):
    """The rows, their gradient from sum(), one element wide, and the gradient of x."""
    batch, tokens, kept, dim = shape
    x, index = draw(batch, tokens, dim), mask(batch, tokens, kept).index
    sizes = allocations(step(lambda x: gather_tokens(x, index, backend=cpu), x))
    results = ELEMENT * batch * (kept + tokens) * dim
    assert peak(sizes) <= results + CONSTANT


def test_assembly(cpu):
    batch, tokens, kept, dim = 4, 300, 100, 256
    context, token, table = draw(batch, kept, dim), draw(dim), draw(tokens, dim)
    first, second = mask(batch, tokens, kept), mask(batch, tokens, 150)

    def function(context, token, table):
        made = assemble_tokens(
            context, first.index, token, second.index, positions=table, backend=cpu
        )
        return made.tokens

    sizes = allocations(step(function, context, token, table))
    sequence, rows = batch * (kept + 150) * dim, batch * kept * dim
    integers = 8 * 2 * batch * (kept + 150)
    assert peak(sizes) <= ELEMENT * (sequence + rows + tokens * dim + dim) + integers + CONSTANT


def test_the_published_form_breaks_the_limit(cpu):
    """The measure tells the two apart: an index of [B, K, D] alone is twice the rows."""
    batch, tokens, kept, dim = SHAPES[0]
    pred, teacher = draw(batch, kept, dim), draw(batch, tokens, dim, grad=False)
    index = mask(batch, tokens, kept).index

    def published(pred):
        target = torch.nn.functional.layer_norm(teacher, (dim,))
        wide = index.unsqueeze(-1).repeat(1, 1, dim)
        return torch.nn.functional.smooth_l1_loss(pred, torch.gather(target, 1, wide))

    assert peak(allocations(step(published, pred))) > 3 * ELEMENT * batch * kept * dim


RESIDENT = """
import re, torch
from vicreg_kernels.tokens import prediction_loss

def resident():
    # Not ru_maxrss, which starts at that of the process this one was forked from.
    return int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def run(pred, teacher, index):
    torch.autograd.grad(prediction_loss(pred, teacher, index, backend="cpu"), pred)

def inputs(batch, kept, dim):
    index = torch.stack([torch.randperm(256)[:kept] for _ in range(batch)])
    return torch.randn(batch, kept, dim, requires_grad=True), torch.randn(batch, 256, dim), index

run(*inputs(2, 8, 64))
ballast = torch.ones(64 << 20)
given = inputs(32, 176, 1280)
before = resident()
run(*given)
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_peak(cpu):
    """What the process holds, however it was allocated: the gradient and 4 MiB."""
    command = [sys.executable, "-c", RESIDENT]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    gradient = ELEMENT * 32 * 176 * 1280
    assert gradient / 2 <= grown <= gradient + (4 << 20)


@pytest.mark.gpu
@pytest.mark.triton_takes(lambda dtype, **_: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_on_cuda(fused, dtype):
    if fused.device != "cuda":
        pytest.skip("CUDA's own count")
    torch.utils.deterministic.fill_uninitialized_memory = False
    pred = draw(128, 176, 1280, dtype=dtype, device="cuda")
    teacher = draw(128, 256, 1280, dtype=dtype, device="cuda", grad=False)
    index = mask(128, 256, 176, device="cuda").index
    function = step(lambda p: prediction_loss(p, teacher, index, backend=fused.name), pred)
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    peaked = torch.cuda.max_memory_allocated() - before
    del kept
    assert peaked <= pred.numel() * pred.element_size() + 16 * 128 * 176 + (1 << 20)
