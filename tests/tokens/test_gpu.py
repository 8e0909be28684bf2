"""Tier 7: the tokens ops on an NVIDIA GPU: real shapes, CUDA graphs, streams, debug mode.

The tests of the other tiers that take the `fused` fixture run there too.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import gpu_steps
from tests.tokens.cases import (
    DTYPES,
    KINDS,
    LAYOUTS,
    check_assembly,
    check_gather,
    check_loss,
    check_scatter,
    draw,
    mask,
    run,
    same,
)
from vicreg_kernels.core import dispatch
from vicreg_kernels.tokens import assemble_tokens, gather_tokens, prediction_loss

pytestmark = pytest.mark.gpu

CUDA = {"device": "cuda"}
# batch, tokens, kept, D: I-JEPA ViT-H, V-JEPA ViT-L (both masks), V-JEPA 2 ViT-g, odd ones
REAL = [
    (16, 256, 176, 1280),
    (4, 1568, 729, 1024),
    (4, 1568, 1095, 1024),
    (2, 2048, 1441, 1408),
    (3, 100, 33, 515),
]


# Of what is left out here, Triton's float32 kernels are launched by test_torch and test_layouts.
@pytest.mark.triton_takes(
    lambda shape, dtype, **_: (shape, dtype) == (REAL[-1], torch.float16)
    or (dtype == torch.bfloat16 and shape not in (*REAL[:3], REAL[-1]))
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_rows_at_real_shapes(backend, shape, dtype):
    batch, tokens, kept, dim = shape
    x = draw(batch, tokens, dim, dtype=dtype, **CUDA)
    check_gather(backend, x, mask(batch, tokens, kept, **CUDA))
    check_gather(backend, x, mask(batch, tokens, kept, repeat=True, **CUDA), repeats=20)
    few = backend == "triton" and dtype == torch.float16  # int32 indices in one dtype
    kind = torch.int64 if few else torch.int32
    packed = mask(batch, tokens, ([kept, 0, tokens, 1] * batch)[:batch], dtype=kind, **CUDA)
    check_gather(backend, x, packed)
    rows = draw(batch, kept, dim, dtype=dtype, **CUDA)
    check_scatter(backend, rows, mask(batch, tokens, kept, **CUDA), tokens, -1.5)


@pytest.mark.triton_takes(
    lambda shape, dtype, kind, **_: (
        (shape, dtype) in ((REAL[0], torch.bfloat16), (REAL[-1], torch.float16))
        and kind == "smooth_l1"  # the others: test_kinds
    )
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_loss_at_real_shapes(backend, shape, dtype, kind):
    batch, tokens, kept, dim = shape
    teacher = draw(batch, tokens, dim, grad=False, **CUDA)
    pred = draw(batch, kept, dim, dtype=dtype, **CUDA)
    check_loss(backend, pred, teacher.to(dtype), mask(batch, tokens, kept, **CUDA).index, kind=kind)
    if backend == "cuda" or dtype == torch.bfloat16:  # Triton compiles all for each mix of dtypes
        check_loss(backend, pred, teacher, mask(batch, tokens, kept, **CUDA).index, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(backend, kind):
    pred, teacher = draw(3, 40, 33, **CUDA), draw(3, 90, 33, grad=False, **CUDA)
    check_loss(backend, pred, teacher, mask(3, 90, 40, **CUDA).index, kind=kind)


@pytest.mark.triton_takes(lambda layout, **_: layout != "transposed")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    z, teacher = (draw(3, n, 40, layout=layout, **CUDA) for n in (5, 9))
    check_gather(backend, teacher, mask(3, 9, 5, **CUDA))
    check_loss(backend, z, teacher.detach(), mask(3, 9, 5, **CUDA).index)


@pytest.mark.triton_takes(
    lambda dtype, ordered, **_: (dtype, ordered) in ((torch.bfloat16, True), (torch.float16, False))
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ordered", [True, False])
def test_assembly_at_real_shapes(backend, dtype, ordered):
    table = draw(1568, 384, **CUDA)
    settings = {"ordered": ordered, **CUDA}
    kept, wanted = mask(3, 1568, 382, **settings), mask(3, 1568, 729, **settings)
    context, token = draw(3, 382, 384, dtype=dtype, **CUDA), draw(384, **CUDA)
    check_assembly(backend, context, kept, token, wanted, table)
    kept, wanted = mask(2, 1568, [602, 382], **settings), mask(2, 1568, [729, 1095], **settings)
    context = draw(984, 384, dtype=dtype, **CUDA)
    check_assembly(backend, context, kept, token, wanted, table)


def whole_step(backend, x, teacher, index, kept, token):
    """Every op, forward and backward."""

    def function(x, token):
        made = assemble_tokens(x, kept, token, index, backend=backend)
        out = made.targets(made.tokens, backend=backend)
        rows = gather_tokens(x, index % x.shape[1], backend=backend)
        return prediction_loss(out + rows, teacher, index, backend=backend)

    return run(function, x, token)


def inputs(batch=4):
    x, teacher = draw(batch, 100, 256, **CUDA), draw(batch, 200, 256, grad=False, **CUDA)
    both = mask(batch, 200, 160, **CUDA).index
    return x, teacher, both[:, 100:].contiguous(), both[:, :100].contiguous(), draw(256, **CUDA)


def test_two_runs_are_bitwise_equal(backend):
    given = inputs()
    first = whole_step(backend, *given)
    for _ in range(3):
        torch.empty(1 << 24, device="cuda").fill_(torch.nan)  # other memory, other timing
        for a, b in zip(whole_step(backend, *given), first, strict=True):
            same(a, b, "two runs")


def test_graph_replay_after_poison(backend):
    """A graph replayed on NaN leaves NaN in every buffer of its pool; whatever a later replay does
    not write anew shows."""
    given = inputs()
    x, teacher, _, _, token = given
    graph, results = gpu_steps.captured(lambda: whole_step(backend, *given))
    for _ in range(2):
        with torch.no_grad():
            for z in (x, teacher, token):
                z.fill_(torch.nan)
        graph.replay()
        assert results[0].isnan()
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
    later = [torch.zeros_like(z).requires_grad_(z.requires_grad) for z in source]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for z, new in zip(later, source, strict=True):
                z.copy_(new)
        actual = whole_step(backend, *later)
    side.synchronize()
    for a, b in zip(actual, wanted, strict=True):
        same(a, b, "side stream")


def test_indices_out_of_range(backend, monkeypatch):
    """NaN without a check, an error in debug mode."""
    monkeypatch.setattr(dispatch, "DEBUG", False)
    x, index = draw(2, 5, 16, **CUDA), mask(2, 5, 3, **CUDA).index
    index[1, 1] = 1 << 30
    rows = gather_tokens(x, index, backend=backend)
    assert rows.isnan().all(-1).tolist() == [[False] * 3, [False, True, False]]
    pred = draw(2, 3, 16, **CUDA)
    assert prediction_loss(pred, x.detach(), index, backend=backend).isnan()
    monkeypatch.setattr(dispatch, "DEBUG", True)
    with pytest.raises(ValueError, match=r"^index: got"):
        gather_tokens(x, index, backend=backend)
    with pytest.raises(ValueError, match=r"^index: got"):
        prediction_loss(pred, x.detach(), index, backend=backend)


def test_offsets_past_two_to_the_31(backend):
    """Tokens far apart in memory: the last one begins past 2^31 elements."""
    stride = ((1 << 31) // 3 + 64) // 16 * 16  # as near tokens: of one Triton kernel
    if torch.cuda.mem_get_info()[0] < 3 * stride * 4:
        pytest.skip("needs about 9 GB of free memory")
    torch.utils.deterministic.fill_uninitialized_memory = False  # the base is not read
    base = torch.empty(stride * 4, dtype=torch.bfloat16, device="cuda")
    far = base.as_strided((1, 4, 64), (0, stride, 1))
    near = draw(1, 4, 64, dtype=torch.bfloat16, grad=False, **CUDA)
    far.copy_(near)
    index = torch.tensor([[3, 0, 3]], device="cuda")
    same(
        gather_tokens(far, index, backend=backend), gather_tokens(near, index, backend=backend), ""
    )
    pred = draw(1, 3, 64, **CUDA)
    losses = [prediction_loss(pred, z, index, backend=backend).detach() for z in (far, near)]
    same(*losses, "loss")


def test_compiled_full_graph(backend):
    given = inputs()
    torch.compiler.reset()
    compiled = torch.compile(
        lambda p, t, i: prediction_loss(p, t, i, backend=backend), fullgraph=True
    )
    pred = draw(4, 60, 256, **CUDA)
    actual = run(lambda p: compiled(p, given[1], given[2]), pred)
    wanted = run(lambda p: prediction_loss(p, given[1], given[2], backend=backend), pred)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
