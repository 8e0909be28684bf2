"""Tier 7: VICRegL on an NVIDIA GPU: real shapes, CUDA graphs, streams, far offsets.

The tests of the other tiers that take the `fused` fixture run there too.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import gpu_steps
from tests.vicregl import cases as vicregl_cases
from tests.vicregl import matches as cases
from tests.vicregl.matches import DTYPES, LAYOUTS, maps, rules, same
from vicreg_kernels.core import loader
from vicreg_kernels.vicregl import contract, op, vicregl_loss

pytestmark = pytest.mark.gpu

CUDA = {"device": "cuda"}
# U, V, B, L1, L2, C: two large views, large and small ones, embeddings, large maps, odd ones.
REAL = [
    (1, 1, 64, 49, 49, 512),
    (2, 6, 32, 49, 9, 512),
    (2, 6, 64, 1, 1, 2048),
    (1, 1, 4, 256, 196, 384),
    (1, 2, 3, 1024, 50, 104),
    (2, 1, 3, 37, 61, 515),
]


# Of what is left out here, Triton's kernels are launched by: float32: test_layouts.
@pytest.mark.triton_takes(
    lambda shape, dtype, **_: dtype == (torch.float16 if shape == REAL[-1] else torch.bfloat16)
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_shapes(backend, shape, dtype):
    cases.check(backend, *maps(shape, dtype=dtype, **CUDA))


@pytest.mark.triton_takes(lambda channels, layout, **_: channels == 40 or layout == "contiguous")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [2, 40, 200])
def test_layouts(backend, channels, layout):
    cases.check(backend, *maps((2, 2, 3, 21, 17, channels), layout=layout, **CUDA))


def test_ties(backend):
    cases.check_ties(backend, "cuda")


def test_close_positions(backend):
    cases.check_close_positions(backend, "cuda")


def test_nan_and_inf(backend):
    cases.check_not_finite(backend, "cuda")


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1])
def test_indices_out_of_range_are_never_followed(backend, bad):
    cases.check_out_of_range(loader.load("vicregl", contract.Kernels, backend), bad, "cuda")


@pytest.mark.triton_takes(
    lambda views, way, **_: views == "small" and way in ("published", "last view")
)
@pytest.mark.parametrize("way", vicregl_cases.WAYS)
@pytest.mark.parametrize("views", vicregl_cases.VIEWS)
def test_whole_loss(backend, views, way):
    """Terms and gradients as near to the reference in float64 as it is in float32, or nearly."""
    inputs = vicregl_cases.draw(vicregl_cases.VIEWS[views], batch=32, channels=64, dim=96, **CUDA)
    settings = vicregl_cases.WAYS[way]
    mine = vicregl_cases.outcome(inputs, backend, **settings)
    plain = vicregl_cases.outcome(inputs, "reference", **settings)
    truth = vicregl_cases.outcome(inputs, "reference", double=True, **settings)
    outcomes = ((*o.values, *o.gradients) for o in (mine, plain, truth))
    for actual, formula, true in zip(*outcomes, strict=True):
        assert (actual is None) == (true is None)
        if actual is not None:
            allowed = 2 * (formula.double() - true).norm() + 1e-5 * true.norm()
            assert (actual.double() - true).norm() <= allowed


def whole_step(backend, a, b):
    """A search and both directions' pairs, forward and backward."""
    matches = op.match(a, b, backend)
    value = op.pairs(a, b, matches, rules(a.shape[2])[2], rules(b.shape[2])[2], backend)
    return *matches, value.detach(), *torch.autograd.grad(value, (a, b))


def inputs():
    return maps((2, 3, 8, 49, 20, 256), **CUDA)


def test_two_runs_are_bitwise_equal(backend):
    given = inputs()
    first = whole_step(backend, *given)
    for _ in range(3):
        torch.empty(1 << 24, device="cuda").fill_(torch.nan)  # other memory, other timing
        for mine, theirs in zip(whole_step(backend, *given), first, strict=True):
            same(mine, theirs, "two runs")


def test_graph_replay_after_poison(backend):
    """A graph replayed on NaN leaves NaN in every buffer of its pool; whatever a later replay does
    not write anew shows."""
    given = inputs()
    graph, results = gpu_steps.captured(lambda: whole_step(backend, *given))
    for _ in range(2):
        with torch.no_grad():
            for z in given:
                z.fill_(torch.nan)
        graph.replay()
        assert results[4].isnan()
        fresh = inputs()
        with torch.no_grad():
            for z, new in zip(given, fresh, strict=True):
                z.copy_(new)
        graph.replay()
        for actual, wanted in zip(results, whole_step(backend, *fresh), strict=True):
            same(actual, wanted, "replay")


def test_no_host_synchronisation(backend):
    given = inputs()
    gpu_steps.check_no_wait(lambda: whole_step(backend, *given))


def test_runs_on_the_current_stream(backend):
    """The inputs are written on a side stream behind slow work."""
    source = inputs()
    wanted = whole_step(backend, *source)
    later = [torch.zeros_like(z).requires_grad_() for z in source]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for z, new in zip(later, source, strict=True):
                z.copy_(new)
        actual = whole_step(backend, *later)
    side.synchronize()
    for mine, theirs in zip(actual, wanted, strict=True):
        same(mine, theirs, "side stream")


def test_offsets_past_two_to_the_31(backend):
    """Positions far apart in memory: the last one begins past 2^31 elements."""
    stride = (1 << 31) // 3 + 64
    if torch.cuda.mem_get_info()[0] < 3 * stride * 4:
        pytest.skip("needs about 9 GB of free memory")
    torch.utils.deterministic.fill_uninitialized_memory = False  # the base is not read
    base = torch.empty(stride * 4, dtype=torch.bfloat16, device="cuda")
    far = base.as_strided((1, 1, 4, 64), (0, 0, stride, 1))
    near, other = (z.detach() for z in maps((1, 1, 1, 4, 4, 64), dtype=torch.bfloat16, **CUDA))
    far.copy_(near)
    results = [whole_step(backend, z.requires_grad_(), other.requires_grad_()) for z in (far, near)]
    for mine, theirs in zip(*results, strict=True):
        same(mine, theirs, "far offsets")


def test_compiled_full_graph(backend):
    embeddings, views, grids = vicregl_cases.draw(vicregl_cases.VIEWS["small"], **CUDA)
    torch.compiler.reset()

    def loss(views):
        return vicregl_loss(embeddings, views, grids, num_matches=(5, 3), backend=backend)

    def run(function):
        value = function(views)
        return value.detach(), *torch.autograd.grad(value, views)

    compiled = run(torch.compile(loss, fullgraph=True))
    for mine, theirs in zip(compiled, run(loss), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
