"""Tier 2: the fused backends against the float64 reference.

Written for the C++ CPU kernels and run on every fused backend the machine has: the `gpu` marked
cases are the same tests on CUDA tensors.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import shapes
from tests.helpers.recorded_ops import RecordedOps
from tests.helpers.tolerances import (
    assert_matches_reference,
    differentiate,
)
from vicreg_kernels import variance_covariance, vicreg_loss, vicreg_terms
from vicreg_kernels.vicreg.conventions import CONVENTIONS

# Cotangents of (loss, invariance, variance, covariance): all differ, one is negative.
FOUR = (0.7, -1.9, 2.3, 1.1)
HALVES = (torch.bfloat16, torch.float16)


def views(make, shape, fused, dtype=torch.float32, grads=(True, True)):
    """Two views of the layout `make`, the second on the scale of the first."""
    return [make(*shape, dtype=dtype, device=fused.device).requires_grad_(g) for g in grads]


@pytest.mark.triton_takes(lambda shape, **_: shape in shapes.FEW)
@pytest.mark.parametrize("shape", shapes.SMALL + shapes.MEDIUM + shapes.LARGE)
def test_shapes(fused, shape):
    x, y = views(shapes.contiguous, shape, fused)
    assert_matches_reference(vicreg_terms, fused.name, x, y, cotangents=FOUR)
    assert_matches_reference(vicreg_loss, fused.name, x, y)


# On the D x D side, test_groups_match_the_reference has aligned groups.
@pytest.mark.triton_takes(lambda shape, **_: shape != (49, 64, 48))
@pytest.mark.parametrize("shape", shapes.GROUPED)
@pytest.mark.parametrize("unbiased", [True, False])
def test_groups(fused, shape, unbiased):
    def function(z, backend):
        return variance_covariance(z, unbiased=unbiased, backend=backend)

    (z,) = views(shapes.randn, shape, fused, grads=(True,))
    assert_matches_reference(function, fused.name, z, cotangents=(1.5, -0.5))


@pytest.mark.parametrize("shape", [(6, 4, 5), (5, 3, 7), (6, 2, 3, 5), (9, 7, 7, 13)])
@pytest.mark.parametrize("convention", ["lightly", "vicregl"])
def test_positions(fused, shape, convention):
    def function(x, y, backend):
        return vicreg_terms(x, y, convention=convention, backend=backend)

    x, y = views(shapes.randn, shape, fused)
    assert_matches_reference(function, fused.name, x, y, cotangents=FOUR)


def test_many_rows(fused):
    """N = 16384, D = 384: the longest column reduction of the published recipes."""
    (z,) = views(shapes.contiguous, (16384, 384), fused, grads=(True,))
    assert_matches_reference(variance_covariance, fused.name, z, cotangents=(1.0, 1.0))


@pytest.mark.triton_takes(
    lambda shape, layout_x, layout_y, **_: (layout_x, layout_y, shape[0] < shape[1])
    in shapes.FEW_LAYOUTS
)
@pytest.mark.parametrize("layout_y", shapes.LAYOUTS)
@pytest.mark.parametrize("layout_x", shapes.LAYOUTS)
@pytest.mark.parametrize("shape", [(23, 37), (37, 23)])
def test_strides(fused, shape, layout_x, layout_y):
    (x,) = views(shapes.LAYOUTS[layout_x], shape, fused, grads=(True,))
    (y,) = views(shapes.LAYOUTS[layout_y], shape, fused, grads=(True,))
    assert_matches_reference(vicreg_loss, fused.name, x, y)


@pytest.mark.triton_takes(lambda shape, **_: shape == (4, 9, 11))
@pytest.mark.parametrize("shape", [(4, 9, 11), (4, 11, 9)])
def test_strided_groups(fused, shape):
    groups, rows, dim = shape
    inputs = (
        shapes.randn(rows, groups, dim, device=fused.device).transpose(0, 1),
        shapes.randn(dim, rows, groups, device=fused.device).permute(2, 1, 0),
        shapes.randn(1, rows, dim, device=fused.device).expand(groups, rows, dim),
        shapes.randn(2 * groups, rows, dim + 3, device=fused.device)[::2, :, 3:],
    )
    if fused.name == "triton":  # compiles a kernel for a stride of 0 that test_collapsed has
        inputs = inputs[:2] + inputs[3:]
    for z in inputs:
        assert_matches_reference(
            variance_covariance, fused.name, z.requires_grad_(), cotangents=(1.0, 2.0)
        )


@pytest.mark.triton_takes(
    lambda shape, dtype, **_: dtype == torch.float16 and shape in ((63, 1031), (521, 127))
)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(2, 3), (33, 31), (31, 67), (63, 1031), (521, 127)])
def test_half(fused, shape, dtype):
    """Statistics, squares and sums in float32: the loss is as exact as the inputs allow."""
    x, y = views(shapes.contiguous, shape, fused, dtype)
    assert_matches_reference(vicreg_terms, fused.name, x, y, cotangents=FOUR)


@pytest.mark.triton_takes(lambda **_: False)  # its layouts in float32: test_strides
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_strides(fused, dtype, layout):
    x, y = views(shapes.LAYOUTS[layout], (19, 26), fused, dtype)
    assert_matches_reference(vicreg_loss, fused.name, x, y)


@pytest.mark.parametrize("grads", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(9, 21), (21, 9)])
def test_gradient_of_either_view(fused, shape, grads):
    x, y = views(shapes.contiguous, shape, fused, grads=grads)
    outcome = assert_matches_reference(vicreg_loss, fused.name, x, y)
    assert tuple(g is not None for g in outcome.gradients) == grads
    both = differentiate(
        lambda x, y: vicreg_loss(x, y, backend=fused.name),
        x.detach().requires_grad_(),
        y.detach().requires_grad_(),
    )
    for alone, together in zip(outcome.gradients, both.gradients, strict=True):
        assert alone is None or torch.equal(alone, together)


def test_no_gradient_wanted(fused):
    x, y = views(shapes.contiguous, (9, 21), fused, grads=(False, False))
    assert not vicreg_loss(x, y, backend=fused.name).requires_grad


@pytest.mark.parametrize("shape", [(9, 21), (21, 9)])
def test_both_views_the_same_tensor(fused, shape):
    def function(z, backend):
        return vicreg_terms(z, z, backend=backend)

    (z,) = views(shapes.contiguous, shape, fused, grads=(True,))
    outcome = assert_matches_reference(function, fused.name, z, cotangents=FOUR)
    assert outcome.values[1].item() == 0.0


SETTINGS = st.fixed_dictionaries(
    {
        "convention": st.sampled_from(sorted(CONVENTIONS)),
        "margin": st.sampled_from([0.0, 0.5, 1.0, 4.0]),
        "eps": st.sampled_from([1e-6, 1e-4, 0.5]),
        "invariance_weight": st.sampled_from([None, 0.0, 3.0]),
        "variance_weight": st.sampled_from([None, 0.0, -2.0]),
        "covariance_weight": st.sampled_from([None, 0.0, 0.25]),
    }
)


@pytest.mark.triton_takes(lambda **_: False)
@settings(max_examples=120)
@given(
    rows=st.integers(2, 80),
    dim=st.integers(2, 90),
    layouts=st.tuples(*[st.sampled_from(sorted(shapes.LAYOUTS))] * 2),
    dtype=st.sampled_from([torch.float32, torch.float32, *HALVES]),
    grads=st.sampled_from([(True, True), (True, False), (False, True)]),
    scale=st.sampled_from([1.0, 0.125, 4.0]),
    seed=st.integers(0, 2**31),
    given_settings=SETTINGS,
)
def test_random_two_views(fused, rows, dim, layouts, dtype, grads, scale, seed, given_settings):
    torch.manual_seed(seed)
    x, y = (
        shapes.LAYOUTS[layout](rows, dim, scale=scale, dtype=dtype, device=fused.device)
        for layout in layouts
    )
    x.requires_grad_(grads[0])
    y.requires_grad_(grads[1])

    def function(x, y, backend):
        return vicreg_terms(x, y, backend=backend, **given_settings)

    assert_matches_reference(function, fused.name, x, y, cotangents=FOUR)


@pytest.mark.triton_takes(lambda **_: False)
@settings(max_examples=80)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(2, 40), st.integers(2, 40)),
    order=st.permutations(range(3)),
    dtype=st.sampled_from([torch.float32, torch.float32, *HALVES]),
    unbiased=st.booleans(),
    normalizer=st.sampled_from(["d", "d(d-1)"]),
    seed=st.integers(0, 2**31),
)
def test_random_groups(fused, shape, order, dtype, unbiased, normalizer, seed):
    """Any order of the three dimensions in memory."""
    torch.manual_seed(seed)
    z = shapes.randn(*(shape[i] for i in order), dtype=dtype, device=fused.device)
    z = z.permute(*(order.index(i) for i in range(3))).requires_grad_()
    assert z.shape == shape

    def function(z, backend):
        return variance_covariance(
            z, unbiased=unbiased, covariance_normalizer=normalizer, backend=backend
        )

    assert_matches_reference(function, fused.name, z, cotangents=(1.3, 0.6))


@pytest.mark.triton_takes(lambda shape, **_: shape == (16, 32))
@pytest.mark.parametrize("shape", [(16, 32), (32, 16), (64, 300), (300, 64)])
def test_collapsed(fused, shape):
    """All rows equal: the hinge is margin - sqrt(eps) and no gradient flows.

    The floor is one rounding of the mean, seen through the steepest part of the square root.
    """
    z = shapes.collapsed(*shape, device=fused.device).requires_grad_()
    slope = 1.0 / (shape[1] * (shape[0] - 1) * 1e-2)
    floor = slope * torch.finfo(torch.float32).eps * z.abs().max().item()
    outcome = assert_matches_reference(
        variance_covariance, fused.name, z, cotangents=(1.0, 1.0), floor=floor
    )
    assert outcome.values[0].item() == pytest.approx(0.99, rel=1e-6)
    assert outcome.values[1].item() < 1e-12


@pytest.mark.parametrize("shape", [(9, 21), (21, 9)])
def test_some_columns_collapsed(fused, shape):
    x, y = views(shapes.contiguous, shape, fused)
    with torch.no_grad():
        x[:, ::3] = 0.5
        y[:, 1::3] = -2.0
    assert_matches_reference(vicreg_terms, fused.name, x, y, cotangents=FOUR)


@pytest.mark.parametrize(("scale", "offset"), [(1e4, 0.0), (1e-4, 0.0), (1.0, 1e4), (1e4, 1e4)])
@pytest.mark.parametrize("shape", [(41, 101), (101, 41)])
def test_scales_and_offsets(fused, shape, scale, offset):
    x, y = views(shapes.contiguous, shape, fused)
    with torch.no_grad():
        for z in (x, y):
            z.mul_(scale).add_(offset)
    assert_matches_reference(vicreg_terms, fused.name, x, y, cotangents=FOUR)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (3, 4)])
@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 0.0)])
def test_nan_and_inf_spread_as_in_the_reference(fused, shape, bad, dtype, weights):
    """The same elements of loss, terms and both gradients are NaN or infinite, sign included."""
    x, y = views(shapes.contiguous, shape, fused, dtype)
    with torch.no_grad():
        x[1, 2] = bad
    names = ("invariance_weight", "variance_weight", "covariance_weight")
    given_weights = dict(zip(names, weights, strict=True)) if weights else {}

    def run(backend, cotangents, function):
        return differentiate(
            lambda x, y: function(x, y, backend=backend, **given_weights),
            x,
            y,
            cotangents=cotangents,
        )

    for function, cotangents in ((vicreg_loss, (1.0,)), (vicreg_terms, FOUR)):
        actual = run(fused.name, cotangents, function)
        expected = run("reference", cotangents, function)
        pairs = zip(
            actual.values + actual.gradients, expected.values + expected.gradients, strict=True
        )
        for mine, theirs in pairs:
            mine, theirs = mine.cpu().double(), theirs.cpu().double()
            assert torch.equal(mine.isnan(), theirs.isnan())
            infinite = theirs.isinf()
            assert torch.equal(mine.isinf(), infinite)
            assert torch.equal(mine[infinite], theirs[infinite])
        assert expected.values[0].isfinite().logical_not().all()


@pytest.mark.parametrize("shape", [(6, 11), (11, 6)])
def test_collapsed_column_without_eps(fused, shape):
    """sqrt at 0 has no derivative: NaN in that column alone, as in the reference."""
    (z,) = views(shapes.contiguous, shape, fused, grads=(True,))
    with torch.no_grad():
        z[:, 3] = 0.5

    def run(backend):
        return differentiate(
            lambda z: variance_covariance(z, eps=0.0, backend=backend), z, cotangents=(1.0, 1.0)
        ).gradients[0]

    expected = run("reference").isnan()
    assert expected[:, 3].all()
    assert expected.sum() == shape[0]
    assert torch.equal(run(fused.name).isnan(), expected)


@pytest.mark.triton_takes(lambda shape, dtype, **_: dtype == torch.float32 and shape[0] == 63)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(63, 1031), (521, 127), (2, 3)])
def test_deterministic_and_inputs_untouched(fused, shape, dtype):
    x, y = views(shapes.transposed, shape, fused, dtype)
    before = [z.detach().clone() for z in (x, y)]
    versions = [z._version for z in (x, y)]

    def run():
        return differentiate(
            lambda x, y: vicreg_terms(x, y, backend=fused.name), x, y, cotangents=FOUR
        )

    first, second = run(), run()
    for a, b in zip(first.values + first.gradients, second.values + second.gradients, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(z, kept) for z, kept in zip((x, y), before, strict=True))
    assert [z._version for z in (x, y)] == versions


@pytest.mark.sampled(2)
@pytest.mark.triton_takes(lambda **_: False)
@pytest.mark.parametrize("shape", [(200, 500), (64, 4096), (5, 2000), (500, 200), (4000, 5)])
def test_any_number_of_threads(fused, shape):
    """Too few tasks for the threads, one each, and long sides cut into parts (4 and 8 threads)."""
    x, y = views(shapes.contiguous, shape, fused)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4, 8):
            torch.set_num_threads(count)
            assert_matches_reference(vicreg_loss, fused.name, x, y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_noncontiguous_incoming_gradients(fused, shape):
    """The backward op reads its four (or one) incoming gradients through their strides."""
    x, y = (shapes.randn(*shape, device=fused.device).requires_grad_() for _ in range(2))
    with RecordedOps() as ops:
        vicreg_loss(x, y, backend=fused.name).backward()
    _, *others = (a.detach() if isinstance(a, torch.Tensor) else a for a in ops.calls[1][1])

    def backward(grads):
        return torch.ops.vicreg_kernels.vicreg_backward(grads, *others)

    spread = torch.randn(12).to(fused.device)[1::3]
    one = torch.full((1,), 1.5, device=fused.device).expand(4)
    for grads in (spread, one, spread[2:3]):
        for strided, dense in zip(backward(grads), backward(grads.clone()), strict=True):
            assert torch.equal(strided, dense)


def test_empty_is_poisoned():
    """The premise of every test here: what torch.empty returns is NaN."""
    assert torch.empty(1000).isnan().all()
    assert torch.ones(3).new_empty(50, 50).isnan().all()


SCRATCH = """
import torch
from vicreg_kernels import vicreg_terms
torch.manual_seed(0)
for shape in [(7, 13), (13, 7), (300, 700), (700, 300)]:
    x, y = (torch.randn(shape, requires_grad=True) for _ in range(2))
    for backend in ("cpu", "reference"):
        terms = vicreg_terms(x, y, backend=backend)
        outcome = [*terms, *torch.autograd.grad(terms.loss, (x, y))]
        if backend == "cpu":
            mine = outcome
    for a, b in zip(mine, outcome):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a glibc setting")
def test_scratch_memory_of_the_compiled_kernels(fused):
    """glibc fills every allocation with -1.7e38, torch's or not: nothing unwritten may be read."""
    if fused.name != "cpu":
        pytest.skip("host memory only")
    tunables = "glibc.malloc.perturb=1:glibc.malloc.tcache_count=0"
    done = subprocess.run(
        [sys.executable, "-c", SCRATCH],
        env={**os.environ, "GLIBC_TUNABLES": tunables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
