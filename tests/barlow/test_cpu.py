"""Tier 2: the fused backends against the float64 reference.

Written for the C++ CPU kernels and run on every fused backend the machine has: the `gpu` marked
cases are the same tests on CUDA tensors.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import shapes
from tests.helpers.recorded_ops import RecordedOps
from tests.helpers.tolerances import (
    CANCELLATION,
    PLAIN_FACTOR,
    assert_matches_reference,
    differentiate,
    relative_error,
)
from vicreg_kernels.barlow import barlow_twins_loss
from vicreg_kernels.barlow.conventions import CONVENTIONS
from vicreg_kernels.barlow.reference import standardise

HALVES = (torch.bfloat16, torch.float16)
LAMBD = 0.0051


def views(make, shape, fused, dtype=torch.float32, grads=(True, True)):
    """Two views of the layout `make`."""
    return [make(*shape, dtype=dtype, device=fused.device).requires_grad_(g) for g in grads]


def hold(fused, x, y, floor=0.0, **kwargs):
    def function(x, y, backend):
        return barlow_twins_loss(x, y, backend=backend, **kwargs)

    return assert_matches_reference(function, fused.name, x, y, cotangents=(-1.7,), floor=floor)


def projected_out(x, y, lambd):
    """Four roundings of the largest element of dL/dz / std, of which the gradient of few rows keeps
    little: nothing with N = 2, one direction with N = 3.
    """
    wide = [z.detach().double() for z in (x, y)]
    first, second = (standardise(z, 1e-5, 0.0, False).requires_grad_() for z in wide)
    correlation = first.t() @ second / len(x)
    squares = (correlation - torch.eye(x.shape[1]).to(correlation)).square()
    loss = lambd * squares.sum() + (1 - lambd) * squares.diagonal().sum()
    gradients = torch.autograd.grad(loss, (first, second))
    largest = max((g / z.std(dim=0)).abs().max() for g, z in zip(gradients, wide, strict=True))
    return 4 * torch.finfo(torch.float32).eps * largest.item()


@pytest.mark.triton_takes(lambda shape, **_: shape in shapes.FEW)
@pytest.mark.parametrize("shape", shapes.SMALL + shapes.MEDIUM + shapes.LARGE)
def test_shapes(fused, shape):
    x, y = views(shapes.contiguous, shape, fused)
    few = shape[0] <= 5
    hold(fused, x, y, floor=projected_out(x, y, LAMBD) if few else 0.0)
    correlated = (x + 0.3 * y).detach().requires_grad_()
    floor = projected_out(x, correlated, 0.5) if few else 0.0
    hold(fused, x, correlated, floor=floor, convention="stable_pretraining", lambd=0.5)


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
    hold(fused, x, y)


@pytest.mark.triton_takes(lambda shape, dtype, **_: dtype == torch.float16 and shape == (521, 127))
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(3, 4), (33, 31), (31, 67), (64, 1031), (521, 127)])
def test_half(fused, shape, dtype):
    """Statistics, squares and sums in float32: the loss is as exact as the inputs allow."""
    hold(fused, *views(shapes.transposed, shape, fused, dtype))


@pytest.mark.parametrize("grads", [(True, False), (False, True)])
@pytest.mark.parametrize("shape", [(9, 21), (21, 9)])
def test_gradient_of_either_view(fused, shape, grads):
    x, y = views(shapes.contiguous, shape, fused, grads=grads)
    outcome = hold(fused, x, y)
    assert tuple(g is not None for g in outcome.gradients) == grads
    both = hold(fused, x.detach().requires_grad_(), y.detach().requires_grad_())
    for alone, together in zip(outcome.gradients, both.gradients, strict=True):
        assert alone is None or torch.equal(alone, together)


@pytest.mark.parametrize("shape", [(9, 21), (21, 9)])
def test_both_views_the_same_tensor(fused, shape):
    def function(z, backend):
        return barlow_twins_loss(z, z, backend=backend)

    (z,) = views(shapes.contiguous, shape, fused, grads=(True,))
    assert_matches_reference(function, fused.name, z)


@pytest.mark.triton_takes(lambda **_: False)
@settings(max_examples=30)
@given(
    rows=st.integers(3, 80),
    dim=st.integers(1, 90),
    layouts=st.tuples(*[st.sampled_from(sorted(shapes.LAYOUTS))] * 2),
    dtype=st.sampled_from([torch.float32, torch.float32, *HALVES]),
    grads=st.sampled_from([(True, True), (True, False), (False, True)]),
    scale=st.sampled_from([1.0, 0.125, 4.0]),
    convention=st.sampled_from(sorted(CONVENTIONS)),
    lambd=st.sampled_from([None, 0.0, 0.25, -2.0]),
    eps=st.sampled_from([None, 1e-3, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_random(fused, rows, dim, layouts, dtype, grads, scale, convention, lambd, eps, seed):
    torch.manual_seed(seed)
    x, y = (
        shapes.LAYOUTS[layout](rows, dim, scale=scale, dtype=dtype, device=fused.device)
        for layout in layouts
    )
    x.requires_grad_(grads[0])
    y.requires_grad_(grads[1])
    hold(fused, x, y, convention=convention, lambd=lambd, eps=eps)


@pytest.mark.triton_takes(lambda shape, **_: shape in ((16, 32), (300, 64)))
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", [(16, 32), (32, 16), (300, 64)])
def test_collapsed(fused, shape, convention):
    """Constant columns, means exact: they correlate with nothing, and nothing is NaN."""
    x, y = views(shapes.contiguous, shape, fused)
    with torch.no_grad():
        x[:, ::3] = 0.5
        y[:, 1::3] = -2.0
    hold(fused, x, y, convention=convention)
    whole = shapes.collapsed(*shape, device=fused.device).requires_grad_()
    outcome = differentiate(
        lambda z: barlow_twins_loss(z, z, convention=convention, backend=fused.name), whole
    )
    expected = CONVENTIONS[convention].scale * shape[1]
    assert outcome.values[0].item() == pytest.approx(expected, rel=1e-6)
    assert not outcome.gradients[0].any()


@pytest.mark.parametrize(("scale", "offset"), [(1e6, 0.0), (1e-2, 0.0), (1.0, 1e4), (1e4, 1e4)])
@pytest.mark.parametrize("shape", [(41, 101), (101, 41)])
def test_scales_and_offsets(fused, shape, scale, offset):
    x, y = views(shapes.contiguous, shape, fused)
    with torch.no_grad():
        for z in (x, y):
            z.mul_(scale).add_(offset)
    hold(fused, x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (3, 4)])
def test_nan_and_inf_spread_as_in_the_reference(fused, shape, bad, dtype):
    """The same elements of both gradients are NaN."""
    x, y = views(shapes.contiguous, shape, fused, dtype)
    with torch.no_grad():
        x[1, 2] = bad

    def run(backend):
        return differentiate(lambda x, y: barlow_twins_loss(x, y, backend=backend), x, y)

    actual, expected = run(fused.name), run("reference")
    assert actual.values[0].isnan()
    for mine, theirs in zip(actual.gradients, expected.gradients, strict=True):
        assert not theirs.isinf().any()
        assert torch.equal(mine.isnan(), theirs.isnan())


@pytest.mark.triton_takes(lambda shape, dtype, **_: dtype == torch.float32 and shape[0] == 127)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(127, 521), (521, 127), (2, 3)])
def test_deterministic_and_inputs_untouched(fused, shape, dtype):
    x, y = views(shapes.transposed, shape, fused, dtype)
    before = [z.detach().clone() for z in (x, y)]
    versions = [z._version for z in (x, y)]

    def run():
        return differentiate(lambda x, y: barlow_twins_loss(x, y, backend=fused.name), x, y)

    first, second = run(), run()
    for a, b in zip(first.values + first.gradients, second.values + second.gradients, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(z, kept) for z, kept in zip((x, y), before, strict=True))
    assert [z._version for z in (x, y)] == versions


@pytest.mark.triton_takes(lambda **_: False)
@pytest.mark.parametrize("shape", [(200, 500), (500, 200), (5, 2100), (2100, 5), (33, 2100)])
def test_any_number_of_threads(fused, shape):
    """Long sides that stay whole and that are cut into parts."""
    x, y = views(shapes.contiguous, shape, fused)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            hold(fused, x, y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_what_the_forward_op_saves(fused, shape):
    """The tensors that op.py documents, against float64; and a strided incoming gradient."""
    x, y = views(shapes.contiguous, shape, fused)
    with RecordedOps() as ops:
        barlow_twins_loss(x, y, backend=fused.name).backward()
    _, *args = (a.detach() if isinstance(a, torch.Tensor) else a for a in ops.calls[1][1])
    moments, diagonal, products = (t.double().cpu() for t in args[2:5])
    wide = [z.detach().double().cpu() for z in (x, y)]
    first, second = (standardise(z, 1e-5, 0.0, False) for z in wide)
    correlation = first.t() @ second / shape[0]
    torch.testing.assert_close(diagonal, correlation.diagonal(), rtol=1e-5, atol=1e-6)
    for v, z in enumerate(wide):
        torch.testing.assert_close(moments[v, 0] + moments[v, 1], z.mean(dim=0), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            moments[v, 2], z.var(dim=0, correction=0) * shape[0], rtol=1e-6, atol=0
        )
    if shape[0] < shape[1]:
        expected = torch.stack([first @ first.t(), second @ second.t()])
    else:
        expected = correlation.fill_diagonal_(0.0).unsqueeze(0)
        assert not products[0].diagonal().any()
    torch.testing.assert_close(products, expected, rtol=1e-5, atol=1e-5)

    def backward(grad):
        return torch.ops.vicreg_kernels.barlow_backward(grad, *args)

    spread = torch.randn(6).to(fused.device)[1::5]
    for strided, dense in zip(backward(spread), backward(spread.clone()), strict=True):
        assert torch.equal(strided, dense)


# What cancels: the Gram side takes sum_j C_jj^2 from ||C||^2 (docs/barlow.md).


def tight_frame(rows, dim):
    """Centred columns of equal norm whose correlations are as small as D of them in N - 1
    dimensions can be: sum_{i != j} C_ij^2 = D (D - N + 1) / (N - 1) where C_ii = 1. rows: odd.
    """
    angle = torch.arange(1, (rows + 1) // 2, dtype=torch.float64)[:, None] * torch.arange(dim)
    angle *= 2 * torch.pi / dim
    z = torch.randn(rows, rows - 1, dtype=torch.float64)
    basis, _ = torch.linalg.qr(z - z.mean(dim=0))  # of the centred vectors
    return basis @ torch.cat([angle.cos(), angle.sin()])


def near_frame(rows, dim):
    """Views so near a tight frame that as much cancels, and far enough to have a gradient."""
    z = tight_frame(rows, dim)
    return z, z + 0.02 * torch.randn_like(z)


def collinear(rows, dim):
    return torch.randn(rows, 1) + 1e-3 * torch.randn(rows, dim)


def uncorrelated(rows, dim):
    """A few columns agree and everything else is orthogonal: the off-diagonal sum is 0, and what
    is left of it must drown in the diagonal's own sum.
    """
    basis = shapes.white(rows, rows // 3).double()
    x, y = basis[:, :1].repeat(1, dim), basis[:, 1:2].repeat(1, dim)
    agreed = rows // 3 - 2
    x[:, :agreed] = y[:, :agreed] = basis[:, 2:]
    return x, y


CANCELLING = {
    "tight frame": lambda: near_frame(49, 63),
    "N = D - 1": lambda: near_frame(61, 62),
    "collinear": lambda: (collinear(48, 96), collinear(48, 96)),
    "collinear and equal": lambda: (collinear(48, 96),) * 2,
    "uncorrelated": lambda: uncorrelated(60, 61),
    "one scale dominates": lambda: (shapes.dominated(64, 512, 1e6),) * 2,
    "scales decay": lambda: (shapes.decaying(64, 512, 0.5), shapes.decaying(64, 512, 0.5)),
}


@pytest.mark.parametrize("case", CANCELLING)
def test_cancellation(fused, case):
    """The value within what subtracting sum_j C_jj^2 can cost at float32, the gradient within the
    common bound or twice the plain formula's error.
    """
    pair = [z.float().to(fused.device).requires_grad_() for z in CANCELLING[case]()]
    wide = [z.detach().double().requires_grad_() for z in pair]

    def run(backend, inputs):
        return differentiate(lambda x, y: barlow_twins_loss(x, y, backend=backend), *inputs)

    actual, plain, truth = run(fused.name, pair), run("reference", pair), run("reference", wide)
    first, second = (standardise(z.detach(), 1e-5, 0.0, False) for z in wide)
    subtracted = ((first * second).mean(dim=0) ** 2).sum().item()
    value, expected = actual.values[0].item(), truth.values[0].item()
    plain_error = abs(plain.values[0].item() - expected)
    eps = torch.finfo(torch.float32).eps
    bound = PLAIN_FACTOR * plain_error + eps * (expected + LAMBD * subtracted)
    assert abs(value - expected) <= bound
    assert abs(value - expected) <= CANCELLATION * expected
    for mine, theirs, true in zip(actual.gradients, plain.gradients, truth.gradients, strict=True):
        allowed = max(CANCELLATION, PLAIN_FACTOR * relative_error(theirs, true))
        assert relative_error(mine, true) <= allowed


@pytest.mark.parametrize(("rows", "dim"), [(49, 64), (63, 64), (17, 256)])
def test_how_much_cancels_at_most(rows, dim):
    """With equal C_jj the subtracted sum is at most (N - 1) / (D - N + 1) of what stays: a tight
    frame reaches that, other views stay below.
    """
    least = (rows - 1) / (dim - rows + 1)

    def share(x, y):
        first, second = (standardise(z, 0.0, 0.0, False) for z in (x, y))
        correlation = first.t() @ second / rows
        diagonal = correlation.diagonal().square().sum()
        return (diagonal / (correlation.square().sum() - diagonal)).item()

    frame = tight_frame(rows, dim)
    assert share(frame, frame) == pytest.approx(least, rel=1e-9)
    x = torch.randn(rows, dim, dtype=torch.float64)
    assert share(x, x) < least
    assert share(x, x + 0.5 * torch.randn(rows, dim)) < least
