"""Tier 3: the bodies of cuda.cu's kernels, and what launches them, against the float64 reference.

The emulator runs them on CPU tensors behind the public function, as backend "cuda". A device of 4
multiprocessors makes small inputs take several blocks of rows and columns.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.barlow.test_cpu import CANCELLING, LAMBD, projected_out
from tests.barlow.views import AGREEING, rounded_alike
from tests.helpers import native, shapes
from tests.helpers.tolerances import (
    CANCELLATION,
    PLAIN_FACTOR,
    assert_matches_reference,
    differentiate,
    relative_error,
)
from vicreg_kernels.barlow import barlow_twins_loss, contract
from vicreg_kernels.barlow.conventions import CONVENTIONS
from vicreg_kernels.barlow.reference import standardise
from vicreg_kernels.core import dispatch, loader

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
SETTINGS = (1e-5, 0.0, False, LAMBD)


def library(sanitize: bool = False):
    """Its half products come in small pieces. The sanitized build is a third as long without
    optimisation, and its run no longer.
    """
    flags = ["-DBARLOW_PRODUCT_ELEMENTS=512", *(["-O0"] if sanitize else [])]
    return native.emulated("barlow", *flags, sanitize=sanitize)


@pytest.fixture(scope="module")
def kernels() -> contract.Kernels:
    torch.ops.load_library(str(library()))
    return loader.compiled("barlow", contract.Kernels, "vicreg_kernels_emulator")


@pytest.fixture(autouse=True)
def emulated(kernels, monkeypatch):
    monkeypatch.setattr(loader, "load", lambda op, kind, name: {"cuda": kernels}[name])
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)


def views(rows, dim, dtype=torch.float32, correlation=0.3):
    x, y = shapes.randn(rows, dim), shapes.randn(rows, dim)
    y = 0.7 * y + correlation * x + 2.0
    return [z.to(dtype).requires_grad_() for z in (x, y)]


def check(x, y, floor=0.0, **settings):
    """Hold the emulated kernels to the one rule of tolerances.py."""
    function = partial(barlow_twins_loss, **settings)
    return assert_matches_reference(function, "cuda", x, y, cotangents=(-1.7,), floor=floor)


def few_rows(x, y):
    """What the rounding of the inputs' dtype leaves of a gradient that vanishes with N = 2."""
    return projected_out(x, y, 0.5) * torch.finfo(x.dtype).eps / torch.finfo(torch.float32).eps


EDGES = [(2, 2), (2, 3), (3, 2), (2, 1), (3, 4), (5, 5), (2, 67), (67, 2)]
TILES = [(31, 33), (33, 31), (64, 64), (33, 136), (136, 33), (70, 264), (264, 40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EDGES + TILES, ids=str)
def test_shapes(shape, dtype):
    x, y = views(*shape, dtype)
    few = shape[0] <= 5
    check(x, y, floor=few_rows(x, y) if few else 0.0)
    if shape in EDGES:
        check(x, y, few_rows(x, y) if few else 0.0, convention="stable_pretraining", lambd=0.5)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions(convention):
    check(*views(12, 24), convention=convention)
    check(*views(24, 12), convention=convention, lambd=-0.2, eps=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", shapes.LAYOUTS)
@pytest.mark.parametrize("other", ["contiguous", "transposed"])
def test_strides(layout, other, dtype):
    for shape in ((12, 24), (24, 12)):
        x = shapes.LAYOUTS[layout](*shape, dtype=dtype).requires_grad_()
        y = shapes.LAYOUTS[other](*shape, dtype=dtype).requires_grad_()
        check(x, y)
        check(y, x)


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 24), (24, 9), (9, 200)], ids=str)
def test_gradient_of_either_view(shape, wanted, dtype):
    inputs = views(*shape, dtype)
    both = differentiate(lambda x, y: barlow_twins_loss(x, y, backend="cuda"), *inputs)
    inputs[1 - wanted].requires_grad_(False)
    alone = differentiate(lambda x, y: barlow_twins_loss(x, y, backend="cuda"), *inputs)
    assert alone.gradients[1 - wanted] is None
    assert torch.equal(alone.gradients[wanted], both.gradients[wanted])


def test_no_gradient_at_all(kernels):
    x, y = shapes.randn(5, 9), shapes.randn(5, 9)
    _, *saved = kernels.forward(x, y, *SETTINGS)
    empty = kernels.backward(torch.ones(1), x, y, *saved, False, False, *SETTINGS)
    assert [z.numel() for z in empty] == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (40, 72)], ids=str)
def test_saved_tensors(kernels, shape, dtype):
    """Shapes and dtypes as registered, and what each holds."""
    x, y = (z.detach() for z in views(*shape, dtype))
    out = kernels.forward(x, y, *SETTINGS)
    for mine, registered in zip(out, contract.empty_saved(x, "cuda"), strict=True):
        assert mine.shape == registered.shape
        assert mine.dtype == registered.dtype
    _, moments, diagonal, products, standardised = out
    wide = torch.stack([x, y]).double()
    z = torch.stack([standardise(v, *SETTINGS[:3]) for v in wide])
    mean, scatter = moments[:, :2].double().sum(dim=1), moments[:, 2].double()
    torch.testing.assert_close(mean, wide.mean(dim=1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scatter, wide.var(dim=1) * (shape[0] - 1), rtol=1e-6, atol=1e-6)
    correlation = z[0].t() @ z[1] / shape[0]
    torch.testing.assert_close(diagonal.double(), correlation.diagonal(), rtol=1e-5, atol=1e-6)
    eps = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(standardised.double(), z, rtol=eps, atol=eps)
    if shape[0] < shape[1]:
        torch.testing.assert_close(products.double(), z @ z.mT, rtol=eps, atol=shape[1] * eps)
    else:
        wanted = correlation.fill_diagonal_(0.0)
        torch.testing.assert_close(products[0].double(), wanted, rtol=eps, atol=eps)
        assert not products[0].diagonal().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # float16 overflows
@pytest.mark.parametrize("convention", ["barlow_twins", "stable_pretraining"])
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)], ids=str)
def test_collapsed(shape, convention, dtype):
    """Constant columns, means exact: they correlate with nothing, and nothing is NaN."""
    x, y = views(*shape, dtype)
    with torch.no_grad():
        x[:, ::3] = 0.5
        y[:, 1::3] = -2.0
    check(x, y, convention=convention)
    whole = shapes.collapsed(*shape, dtype=dtype).requires_grad_()
    outcome = differentiate(
        lambda z: barlow_twins_loss(z, z, convention=convention, backend="cuda"), whole
    )
    assert outcome.values[0].item() == pytest.approx(shape[1], rel=1e-6)
    assert not outcome.gradients[0].any()


@pytest.mark.parametrize(("scale", "offset"), [(1e4, 0.0), (1e-4, 0.0), (1.0, 1e4), (1e4, 1e4)])
@pytest.mark.parametrize("shape", [(40, 72), (72, 40)], ids=str)
def test_scales_and_offsets(shape, scale, offset):
    for dtype in DTYPES:
        inputs = [z.detach().float().mul(scale).add(offset) for z in views(*shape)]
        x, y = (z.to(dtype) for z in inputs)
        if x.isfinite().all() and y.isfinite().all():
            check(x.requires_grad_(), y.requires_grad_())


@pytest.mark.parametrize("row", [0, 17])
def test_a_large_row_does_not_spoil_the_statistics(row):
    """Also where it is row 0, which the sums are taken about."""
    x, y = (z.detach() for z in views(40, 24))
    x[row] += 1e4
    check(x.requires_grad_(), y.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AGREEING, ids=str)
def test_gradients_of_views_that_agree(case, dtype):
    """The gradient points along z2 - C_jj z1 and across z1: what the rounding of z and of the Gram
    matrix's diagonal costs there must not outgrow that of the result.
    """
    shape, agreement, lambd, factor = case
    x, y = views(*shape, dtype, agreement)
    outcome, truth = (
        differentiate(lambda x, y, b=b: barlow_twins_loss(x, y, lambd=lambd, backend=b), *inputs)
        for b, inputs in (
            ("cuda", (x, y)),
            ("reference", [z.detach().double().requires_grad_() for z in (x, y)]),
        )
    )
    for mine, true in zip(outcome.gradients, truth.gradients, strict=True):
        assert relative_error(mine, true) <= factor * max(torch.finfo(dtype).eps, 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(6, 16), (16, 6), (3, 4)], ids=str)
@pytest.mark.parametrize("row", [0, 1])
def test_nan_and_inf_spread_as_in_the_reference(shape, bad, row):
    for dtype in DTYPES:
        x, y = views(*shape, dtype)
        with torch.no_grad():
            x[row, 2] = bad
        actual, expected = (
            differentiate(lambda x, y, b=b: barlow_twins_loss(x, y, backend=b), x, y)
            for b in ("cuda", "reference")
        )
        assert actual.values[0].isnan()
        for mine, theirs in zip(actual.gradients, expected.gradients, strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())


@pytest.mark.parametrize("case", ["tight frame", "N = D - 1", "collinear", "uncorrelated"])
def test_cancellation(case):
    pair = [z.float().requires_grad_() for z in CANCELLING[case]()]
    wide = [z.detach().double().requires_grad_() for z in pair]
    actual, plain, truth = (
        differentiate(lambda x, y, b=b: barlow_twins_loss(x, y, backend=b), *inputs)
        for b, inputs in (("cuda", pair), ("reference", pair), ("reference", wide))
    )
    assert relative_error(actual.values[0], truth.values[0]) <= CANCELLATION
    for mine, theirs, true in zip(actual.gradients, plain.gradients, truth.gradients, strict=True):
        allowed = max(CANCELLATION, PLAIN_FACTOR * relative_error(theirs, true))
        assert relative_error(mine, true) <= allowed


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_values_where_the_diagonal_is_most_of_the_squares(dtype):
    """What comes off is the diagonal of the rounded values: the exact one would leave 7 eps."""
    x, eps = rounded_alike(dtype)
    loss, truth = (
        barlow_twins_loss(z, z, lambd=1e3, eps=eps, backend=backend)
        for z, backend in ((x, "cuda"), (x.double(), "reference"))
    )
    assert relative_error(loss, truth) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(33, 136), (136, 33)], ids=str)
def test_any_order_of_blocks_gives_the_same_bits(shape, dtype, monkeypatch):
    x, y = views(*shape, dtype)
    before = [z.detach().clone() for z in (x, y)]

    def run(seed):
        monkeypatch.setenv("EMULATOR_SEED", str(seed))
        outcome = differentiate(lambda x, y: barlow_twins_loss(x, y, backend="cuda"), x, y)
        return outcome.values + outcome.gradients

    first = run(0)
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(seed), strict=True))
    assert all(torch.equal(z, kept) for z, kept in zip((x, y), before, strict=True))


@pytest.mark.parametrize("count", [1, 132])
@pytest.mark.parametrize("shape", [(40, 140), (140, 40)], ids=str)
def test_any_number_of_multiprocessors(shape, count, monkeypatch):
    monkeypatch.setenv("EMULATOR_MULTIPROCESSORS", str(count))
    check(*views(*shape))


SANITIZED = """
import sys, torch
from tests.helpers import native
from vicreg_kernels.barlow import reference
library, mode = sys.argv[1:]
torch.ops.load_library(library)
op = torch.ops.vicreg_kernels_emulator
torch.manual_seed(0)
for i, (rows, dim) in enumerate([(2, 2), (3, 5), (5, 1), (17, 17), (34, 136), (70, 33)]):
    settings = ((1e-5, 0.0, False, 0.3), (0.0, 1e-5, True, 0.0051))[i % 2]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for x, y in ((torch.randn(rows, dim).to(dtype), torch.randn(dim, rows).to(dtype).t()),
                     torch.randn(2, rows, dim).to(dtype)):
            out = op.barlow_forward(x, y, *settings)
            saved = list(out[1:])
            if mode == "short":
                native.shortened(saved[0])  # the moments
            grads = op.barlow_backward(torch.ones(1), x, y, *saved, True, True, *settings)
            a, b = (z.double().requires_grad_() for z in (x, y))
            loss = reference.loss(a, b, *settings)
            loss.backward()
            close = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(out[0][0].double(), loss.detach(), rtol=close, atol=1e-6)
            for grad, truth in zip(grads, (a.grad, b.grad)):
                assert rows == 2 or (grad.double() - truth).norm() < close * truth.norm()
    op.barlow_backward(torch.ones(1), x, y, *saved, i % 2 == 0, i % 2 == 1, *settings)
print("clean")
"""


def run_sanitized(mode):
    return native.run_sanitized(SANITIZED, library(sanitize=True), mode)


@pytest.mark.thorough
def test_sanitized():
    done = run_sanitized("plain")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


@pytest.mark.thorough
def test_the_sanitizer_sees_a_short_tensor():
    done = run_sanitized("short")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
