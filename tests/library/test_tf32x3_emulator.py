"""Tier 3: precision="tf32x3" of the CUDA backend under the emulator, against the float64 reference.

The emulator's tensor core cuts its sums off towards zero. A device of 4 multiprocessors makes small
inputs take parts of the sum; EMULATOR_MULTIPROCESSORS=1 makes them take the large tiles.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.barlow import test_emulator as test_barlow_emulator
from tests.helpers import shapes
from tests.helpers.tolerances import (
    CANCELLATION,
    PLAIN_FACTOR,
    assert_matches_reference,
    column_errors,
    differentiate,
    relative_error,
)
from tests.vicreg import test_emulator as test_vicreg_emulator
from vicreg_kernels import barlow_twins_loss, variance_covariance, vicreg_terms
from vicreg_kernels.barlow import contract as barlow_contract
from vicreg_kernels.core import dispatch, loader
from vicreg_kernels.vicreg import contract as vicreg_contract

FOUR = (0.7, -1.9, 2.3, 1.1)
SETTINGS = (1.0, 1e-4, True, [1.0, 0.5, 0.25], [25.0, 25.0, 1.0])


@pytest.fixture(scope="module")
def kernels():
    for op in (test_vicreg_emulator, test_barlow_emulator):
        torch.ops.load_library(str(op.library()))
    namespace = "vicreg_kernels_emulator"
    return {
        op: loader.compiled(op, contract.Kernels, namespace)
        for op, contract in (("vicreg", vicreg_contract), ("barlow", barlow_contract))
    }


@pytest.fixture(autouse=True)
def emulated(kernels, monkeypatch):
    monkeypatch.setattr(loader, "load", lambda op, kind, name: {"cuda": kernels[op]}[name])
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)


def two(*shape):
    return [shapes.randn(*shape).requires_grad_() for _ in "xy"]


terms = partial(vicreg_terms, precision="tf32x3")
one_view = partial(variance_covariance, precision="tf32x3")
barlow = partial(barlow_twins_loss, precision="tf32x3")


def covariance(z, backend, precision=None):
    return variance_covariance(z, precision=precision, backend=backend)[1]


# One column, edges that no tile divides, addresses that allow 4 and 16 bytes, both sides of N = D.
SIZES = [(2, 3), (5, 1), (33, 31), (64, 64), (65, 132), (67, 34), (130, 66)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_vicreg(shape):
    assert_matches_reference(terms, "cuda", *two(*shape), cotangents=FOUR)


@pytest.mark.parametrize("shape", [(2, 3), (5, 1), (33, 132), (67, 34)], ids=str)
def test_barlow(shape):
    x, y = shapes.randn(*shape), shapes.randn(*shape)
    views = [x.requires_grad_(), (0.7 * y + 0.3 * x.detach() + 2.0).requires_grad_()]
    assert_matches_reference(barlow, "cuda", *views)


@pytest.mark.parametrize("shape", [(3, 5, 36), (2, 36, 5)], ids=str)
def test_groups(shape):
    assert_matches_reference(
        one_view, "cuda", shapes.randn(*shape).requires_grad_(), cotangents=(1.5, -0.5)
    )


@pytest.mark.parametrize("shape", [(33, 140), (140, 33)], ids=str)
def test_large_tiles(shape, monkeypatch):
    monkeypatch.setenv("EMULATOR_MULTIPROCESSORS", "1")
    assert_matches_reference(one_view, "cuda", two(*shape)[0], cotangents=(1.5, -0.5))


@pytest.mark.parametrize("shape", [(20, 68), (68, 20)], ids=str)
def test_large_mean(shape):
    """An offset of 1e4 beside a spread of 1: the products see centred values."""
    views = [(z.detach() + 1e4).requires_grad_() for z in two(*shape)]
    assert_matches_reference(terms, "cuda", *views, cotangents=FOUR)


def test_long_sums_of_one_sign(kernels):
    """The Gram matrix's diagonal: what the tensor core cuts off must not add up."""
    z = torch.rand(1, 2, 2048) + 0.5
    z[:, 1] += 4.0
    squares = kernels["vicreg"].forward(z, None, *SETTINGS, True)[2]
    centred = z.double() - z.double().mean(dim=1, keepdim=True)
    truth = centred @ centred.mT
    assert relative_error(squares, truth) < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("count", [1, 4])
def test_dominating_dimensions(count):
    z = shapes.dominated(32, 256, 300.0, count).requires_grad_()
    actual = differentiate(lambda z: covariance(z, "cuda", "tf32x3"), z)
    wide = z.detach().double().requires_grad_()
    truth = differentiate(lambda z: covariance(z, "reference"), wide)
    assert relative_error(actual.values[0], truth.values[0]) <= CANCELLATION
    assert column_errors(actual.gradients[0], truth.gradients[0]).max() <= CANCELLATION


def test_near_white():
    z = shapes.white(300, 40).requires_grad_()
    runs = (("cuda", "tf32x3"), ("reference", None))
    actual, plain = (differentiate(lambda z, r=r: covariance(z, *r), z) for r in runs)
    wide = z.detach().double().requires_grad_()
    truth = differentiate(lambda z: covariance(z, "reference"), wide)
    for k in ("values", "gradients"):
        mine, theirs, true = (getattr(o, k)[0] for o in (actual, plain, truth))
        assert relative_error(mine, true) <= PLAIN_FACTOR * relative_error(theirs, true)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(6, 36), (36, 6)], ids=str)
def test_what_is_not_finite_stays_in_its_place(kernels, shape, bad):
    """As in full float32: of its own view and group, and there of its row or column."""
    x, y = shapes.randn(2, *shape), shapes.randn(2, *shape)
    x[1, 2, 3] = bad
    split, plain = (kernels["vicreg"].forward(x, y, *SETTINGS, tf32x3) for tf32x3 in (True, False))
    assert split[2][0, 0].isfinite().all()
    assert split[2][1].isfinite().all()
    for mine, theirs in zip(split, plain, strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())
    grads = [
        kernels["vicreg"].backward(torch.ones(1), x, y, *saved, True, True, *SETTINGS, tf32x3)
        for (_, *saved), tf32x3 in ((split, True), (plain, False))
    ]
    for mine, theirs in zip(*grads, strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())
    assert all(grad[0].isfinite().all() for grad in grads[0])
    assert not grads[0][0][1].isfinite().any(dim=0)[3]


@pytest.mark.parametrize("shape", [(1, 34, 260), (1, 260, 34)], ids=str)
def test_any_order_of_blocks_gives_the_same_bits(kernels, shape, monkeypatch):
    """The sum is taken in parts, and the square matrix is exactly symmetric."""
    z = shapes.randn(*shape)
    runs = []
    for seed in (0, 1):
        monkeypatch.setenv("EMULATOR_SEED", str(seed))
        runs.append(kernels["vicreg"].forward(z, None, *SETTINGS, True))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(runs[0][2], runs[0][2].mT)


def test_half_inputs_and_the_default_are_not_touched(kernels):
    for dtype in (torch.float32, torch.bfloat16):
        z = shapes.randn(1, 20, 68, dtype=dtype)
        asked, default, off = (
            kernels["vicreg"].forward(z, None, *SETTINGS, *flag)[2]
            for flag in ((True,), (), (False,))
        )
        assert torch.equal(default, off)
        assert torch.equal(asked, default) == (dtype == torch.bfloat16)
