"""Tier 3: the bodies of cuda.cu's kernels, and what launches them, against the float64 reference.

The emulator runs them on CPU tensors behind the public functions, as backend "cuda". A device of 4
multiprocessors makes small inputs take several blocks of rows and columns.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import native, shapes
from tests.helpers.tolerances import (
    CANCELLATION,
    PLAIN_FACTOR,
    assert_matches_reference,
    column_errors,
    differentiate,
    relative_error,
)
from vicreg_kernels import variance_covariance, vicreg_loss, vicreg_terms
from vicreg_kernels.core import dispatch, loader
from vicreg_kernels.vicreg import contract

FOUR = (0.7, -1.9, 2.3, 1.1)
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


def library(sanitize: bool = False):
    """Its half products come in small pieces."""
    return native.emulated("vicreg", "-DVICREG_PRODUCT_ELEMENTS=512", sanitize=sanitize)


@pytest.fixture(scope="module")
def kernels() -> contract.Kernels:
    torch.ops.load_library(str(library()))
    return loader.compiled("vicreg", contract.Kernels, "vicreg_kernels_emulator")


@pytest.fixture(autouse=True)
def emulated(kernels, monkeypatch):
    monkeypatch.setattr(loader, "load", lambda op, kind, name: {"cuda": kernels}[name])
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)


def draw(*shape, dtype=torch.float32, grad=True):
    return shapes.randn(*shape, dtype=dtype).requires_grad_(grad)


def check(function, *inputs, **settings):
    """Hold the emulated kernels to the one rule of tolerances.py."""
    return assert_matches_reference(function, "cuda", *inputs, **settings)


EDGES = [(2, 2), (2, 3), (3, 2), (2, 1), (3, 4), (4, 5), (5, 5), (2, 67), (67, 2)]
TILES = [(31, 33), (33, 31), (64, 64), (65, 131), (131, 65), (97, 300), (300, 97), (32, 520)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EDGES + TILES)
def test_shapes(shape, dtype):
    x, y = (draw(*shape, dtype=dtype) for _ in range(2))
    check(vicreg_terms, x, y, cotangents=FOUR)


@pytest.mark.parametrize("shape", [(3, 70), (70, 3), (40, 264), (264, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unbiased", [True, False])
def test_one_view(shape, dtype, unbiased):
    def function(z, backend):
        return variance_covariance(z, unbiased=unbiased, backend=backend)

    check(function, draw(*shape, dtype=dtype), cotangents=(1.5, -0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 3, 3), (5, 4, 6), (5, 6, 4), (49, 3, 5), (3, 37, 72), (3, 72, 37)]
)
def test_groups(shape, dtype):
    check(variance_covariance, draw(*shape, dtype=dtype), cotangents=(1.5, -0.5))
    groups, rows, dim = shape

    def function(x, y, backend):
        return vicreg_terms(x, y, convention="vicregl", backend=backend)

    x, y = (draw(rows, groups, dim, dtype=dtype) for _ in range(2))
    check(function, x, y, cotangents=FOUR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout_x", shapes.LAYOUTS)
@pytest.mark.parametrize("layout_y", shapes.LAYOUTS)
def test_strides(layout_x, layout_y, dtype):
    for shape in ((12, 24), (24, 12)):
        x, y = (
            shapes.LAYOUTS[layout](*shape, dtype=dtype).requires_grad_()
            for layout in (layout_x, layout_y)
        )
        check(vicreg_loss, x, y)


def test_strided_groups():
    inputs = (
        shapes.randn(9, 4, 11).transpose(0, 1),
        shapes.randn(11, 9, 4).permute(2, 1, 0),
        shapes.randn(1, 11, 9).expand(4, 11, 9),
        shapes.randn(8, 9, 16)[::2, :, 8:],
        shapes.randn(4, 18, 8)[:, ::2],
    )
    for z in inputs:
        check(variance_covariance, z.requires_grad_(), cotangents=(1.0, 2.0))


@pytest.mark.parametrize("grads", [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 24), (24, 9)])
def test_gradient_of_either_view(shape, grads, dtype):
    x, y = (draw(*shape, dtype=dtype) for _ in range(2))
    both = differentiate(lambda x, y: vicreg_loss(x, y, backend="cuda"), x, y)
    x.requires_grad_(grads[0]), y.requires_grad_(grads[1])
    outcome = check(vicreg_loss, x, y)
    for alone, together, wants in zip(outcome.gradients, both.gradients, grads, strict=True):
        assert (alone is not None) == wants
        assert alone is None or torch.equal(alone, together)


@pytest.mark.parametrize("shape", [(1, 6, 9), (1, 9, 6)])
def test_incoming_gradients(kernels, shape):
    """One or four numbers, contiguous: op.py makes them so, the raw op asks for it."""
    x, y = (shapes.randn(*shape) for _ in range(2))
    settings = (1.0, 1e-4, True, [1.0, 0.5, 0.25], [25.0, 25.0, 1.0])
    _, *saved = kernels.forward(x, y, *settings)
    for grads in (torch.randn(9)[2:6], torch.randn(9)[5:6]):
        within, alone = (
            kernels.backward(g, x, y, *saved, True, True, *settings) for g in (grads, grads.clone())
        )
        assert all(torch.equal(a, b) for a, b in zip(within, alone, strict=True))
    for grads in (torch.randn(12)[1::3], torch.randn(1).expand(4)):
        with pytest.raises(RuntimeError, match="grads: got strides"):
            kernels.backward(grads, x, y, *saved, True, True, *settings)
    empty = kernels.backward(torch.ones(1), x, y, *saved, False, False, *settings)
    assert [z.numel() for z in empty] == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 4, 3), (1, 5, 9)])
def test_saved_tensors(kernels, shape, dtype, views):
    """Shapes and dtypes as registered, and what each holds."""
    x, y = (3.0 * shapes.randn(*shape) + 2.0).to(dtype), shapes.randn(*shape, dtype=dtype)
    settings = (1.0, 1e-4, True, [1.0, 0.5, 0.25], [25.0, 25.0, 1.0])
    out = kernels.forward(x, y if views == 2 else None, *settings)
    for mine, registered in zip(out, contract.empty_saved(x, views, "cuda"), strict=True):
        assert mine.shape == registered.shape
        assert mine.dtype == registered.dtype
    _, moments, squares, deflated, index, centred = out
    z = torch.stack([x, y][:views]).double()
    zc = z - z.mean(dim=2, keepdim=True)
    mean, scatter = moments[:, :, :2].double().sum(dim=2), moments[:, :, 2].double()
    torch.testing.assert_close(mean, z.mean(dim=2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scatter, zc.square().sum(dim=2), rtol=1e-6, atol=1e-6)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    off = zc.mT @ zc * (1 - torch.eye(shape[2]))
    if shape[1] >= shape[2]:
        torch.testing.assert_close(squares.double(), off, **close)
        assert not squares.diagonal(dim1=2, dim2=3).any()
        torch.testing.assert_close(centred.double(), zc, **close)
        return
    torch.testing.assert_close(squares.double(), zc @ zc.mT, **close)
    largest = zc.square().sum(2).topk(index.shape[2]).indices
    assert torch.equal(index, largest)
    rows = index.unsqueeze(2).expand(-1, -1, shape[1], -1)
    gradient = (zc @ off).gather(3, rows).mT
    torch.testing.assert_close(deflated.double(), gradient, rtol=close["rtol"], atol=1.0)
    assert not centred.gather(3, rows).any(), "the products leave the deflated columns out"


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (64, 300)])
def test_collapsed(shape):
    z = shapes.collapsed(*shape).requires_grad_()
    slope = 1.0 / (shape[1] * (shape[0] - 1) * 1e-2)
    floor = slope * torch.finfo(torch.float32).eps * z.abs().max().item()
    outcome = check(variance_covariance, z, cotangents=(1.0, 1.0), floor=floor)
    assert outcome.values[0].item() == pytest.approx(0.99, rel=1e-6)
    assert outcome.values[1].item() < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "offset"), [(1e4, 0.0), (1e-4, 0.0), (1.0, 1e4), (1e4, 1e4)])
@pytest.mark.parametrize("shape", [(40, 100), (100, 40)])
def test_scales_and_offsets(shape, scale, offset, dtype):
    grad = not (dtype == torch.float16 and scale == 1e4)  # there the gradient overflows the dtype
    x, y = (shapes.randn(*shape).mul(scale).add(offset).to(dtype) for _ in range(2))
    check(vicreg_terms, x.requires_grad_(grad), y.requires_grad_(grad), cotangents=FOUR)


@pytest.mark.parametrize("rows", [(0,), (17,)])
def test_a_large_row_does_not_spoil_the_statistics(rows):
    """Also where it is row 0, which the sums are taken about."""
    z = shapes.randn(40, 24)
    z[list(rows)] += 1e4
    check(variance_covariance, z.requires_grad_(), cotangents=(1.0, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(6, 16), (16, 6), (3, 4)])
@pytest.mark.parametrize("row", [0, 1])
def test_nan_and_inf_spread_as_in_the_reference(shape, bad, dtype, row):
    x, y = (draw(*shape, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        x[row, 2] = bad

    def run(backend):
        return differentiate(
            lambda x, y: vicreg_terms(x, y, backend=backend), x, y, cotangents=FOUR
        )

    actual, expected = run("cuda"), run("reference")
    assert not expected.values[0].isfinite()
    for mine, theirs in zip(
        actual.values + actual.gradients, expected.values + expected.gradients, strict=True
    ):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine[mine.isinf()], theirs[theirs.isinf()])


@pytest.mark.parametrize("bad_columns", [1, 6, 300])
def test_deflated_columns_with_nan(kernels, bad_columns):
    """K different columns of the input, the largest of the finite ones first."""
    z = shapes.randn(1, 5, 300)
    z[0, 2, :bad_columns] = float("nan")
    *_, index, _ = kernels.forward(z, None, 1.0, 1e-4, True, [0.0, 1.0, 1.0], [0.0, 1.0, 1.0])
    assert len(set(index[0, 0].tolist())) == 4
    assert set(index[0, 0].tolist()) <= set(range(300))
    if bad_columns < 300:
        largest = z[0].double().var(dim=0).nan_to_num(-1.0).topk(4).indices
        assert torch.equal(index[0, 0], largest)


DOMINATED = {
    "one_64x512": lambda: shapes.dominated(64, 512, 300.0),
    "one_256x2048": lambda: shapes.dominated(256, 2048, 100.0),
    "two": lambda: shapes.dominated(64, 512, 300.0, 2),
    "four": lambda: shapes.dominated(64, 512, 300.0, 4),
    "eight": lambda: shapes.dominated(64, 512, 300.0, 8),
    "decaying": lambda: shapes.decaying(64, 512, 0.5),
    "grouped": lambda: torch.stack(
        [shapes.dominated(32, 96, 300.0).roll(7 * g, 1) for g in range(3)]
    ),
}


def covariance(z, backend):
    return variance_covariance(z, backend=backend)[1]


def true_covariance(z):
    wide = z.detach().double().requires_grad_()
    return differentiate(lambda z: covariance(z, "reference"), wide)


@pytest.mark.parametrize("case", DOMINATED)
def test_dominating_dimensions(case):
    z = DOMINATED[case]().requires_grad_()
    actual = differentiate(lambda z: covariance(z, "cuda"), z)
    truth = true_covariance(z)
    value = relative_error(actual.values[0], truth.values[0])
    whole = relative_error(actual.gradients[0], truth.gradients[0])
    by_column = column_errors(actual.gradients[0], truth.gradients[0]).max().item()
    for name, error in (("value", value), ("gradient", whole), ("worst column", by_column)):
        assert error <= CANCELLATION, f"{name}: {error:.2e}"


def test_near_white():
    """No worse than twice the plain D x D formula in float32."""
    z = shapes.white(600, 96).requires_grad_()
    actual, plain = (
        differentiate(lambda z, b=backend: covariance(z, b), z) for backend in ("cuda", "reference")
    )
    truth = true_covariance(z)
    for k in ("values", "gradients"):
        mine, theirs, true = (getattr(o, k)[0] for o in (actual, plain, truth))
        assert relative_error(mine, true) <= PLAIN_FACTOR * relative_error(theirs, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(33, 300), (300, 33)])
def test_any_order_of_blocks_gives_the_same_bits(shape, dtype, monkeypatch):
    x, y = (draw(*shape, dtype=dtype) for _ in range(2))
    before = [z.detach().clone() for z in (x, y)]

    def run(seed):
        monkeypatch.setenv("EMULATOR_SEED", str(seed))
        outcome = differentiate(
            lambda x, y: vicreg_terms(x, y, backend="cuda"), x, y, cotangents=FOUR
        )
        return outcome.values + outcome.gradients

    first = run(0)
    for seed in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(seed), strict=True))
    assert all(torch.equal(z, kept) for z, kept in zip((x, y), before, strict=True))


@pytest.mark.parametrize("count", [1, 132])
@pytest.mark.parametrize("shape", [(100, 140), (140, 100)])
def test_any_number_of_multiprocessors(shape, count, monkeypatch):
    monkeypatch.setenv("EMULATOR_MULTIPROCESSORS", str(count))
    check(vicreg_terms, draw(*shape), draw(*shape), cotangents=FOUR)


SANITIZED = """
import sys, torch
from tests.helpers import native
from vicreg_kernels.vicreg import reference
library, mode = sys.argv[1:]
torch.ops.load_library(library)
op = torch.ops.vicreg_kernels_emulator
settings = (1.1, 1e-4, True, [1.0, 0.5, 0.2], [25.0, 25.0, 1.0])
torch.manual_seed(0)
shapes = [(1, 2, 2), (1, 2, 3), (1, 3, 2), (2, 5, 1), (2, 17, 17), (1, 40, 264), (2, 70, 33)]
for groups, rows, dim in shapes:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for x, y in ((torch.randn(groups, rows, dim).to(dtype),
                      torch.randn(groups, dim, rows).to(dtype).transpose(1, 2)),
                     torch.randn(2, groups, rows, dim).to(dtype)):
            out = op.vicreg_forward(x, y, *settings)
            saved = list(out[1:])
            if mode == "short":
                native.shortened(saved[0])  # the moments
            grads = op.vicreg_backward(torch.ones(1), x, y, *saved, True, True, *settings)
            a, b = (z.double().requires_grad_() for z in (x, y))
            loss = reference.terms(a, b, *settings)[0]
            loss.backward()
            close = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(out[0][0].double(), loss.detach(), rtol=close, atol=1e-6)
            for grad, truth in zip(grads, (a.grad, b.grad)):
                assert (grad.double() - truth).norm() < close * truth.norm()
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
