"""Tier 3: the bodies of cuda.cu's kernels, and what launches them, against the float64 reference.

The emulator runs them on CPU tensors behind the public functions, as backend "cuda". A device of 4
multiprocessors makes small inputs take several blocks of rows and columns.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import native
from tests.helpers.shapes import LAYOUTS, randn
from tests.helpers.tolerances import differentiate
from tests.sigreg import cases as sigreg_cases
from tests.sigreg.cases import KNOTS, check
from vicreg_kernels.core import dispatch, loader
from vicreg_kernels.sigreg import contract, sigreg_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def kernels() -> contract.Kernels:
    torch.ops.load_library(str(native.emulated("sigreg")))
    return loader.compiled("sigreg", contract.Kernels, "vicreg_kernels_emulator")


@pytest.fixture(autouse=True)
def emulated(kernels, monkeypatch):
    monkeypatch.setattr(loader, "load", lambda op, kind, name: {"cuda": kernels}[name])
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)


# N, D, M: one of each, odd, prime, off the blocks of 32 columns and of 32 rows by one.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 3, 7), (9, 1, 3), (3, 2, 1), (2, 67, 33), (31, 5, 32), (33, 4, 31), (300, 40, 70)]
)
def test_shapes(shape, dtype):
    rows, dim, slices = shape
    check("cuda", randn(rows, dim, dtype=dtype).requires_grad_(), slices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", ["lejepa", "eb_jepa", "stable_pretraining"])
def test_groups_and_variants(convention, dtype):
    check("cuda", randn(3, 35, 6, dtype=dtype).requires_grad_(), 40, convention=convention)


@pytest.mark.parametrize("knots", KNOTS)
def test_every_kind_of_knots(kernels, knots):
    """Projections up to 50 and beyond, where an angle in float32 has lost its last digits."""
    for spread in (1.0, 17.0):
        z, directions = spread * torch.randn(2, 45, 7), sigreg_cases.unit(7, 35)
        sigreg_cases.check_sums(kernels, z, directions, KNOTS[knots])
        for dtype in DTYPES:
            sigreg_cases.check_gradient(kernels, 40, 9, 33, KNOTS[knots], dtype, 2, spread=spread)


def test_every_number_of_pairs(kernels):
    """1 to 17 equally spaced knots of both kinds: every instance, whole and with a knot too many;
    of many projections and of one.
    """
    for count in range(1, 18):
        for start in (1.0, 0.5):
            knots = [0.3 * (start + k) for k in range(count)]
            for shape in ((40, 5, 33), (1, 1, 1)):
                z = 2.0 * torch.randn(1, *shape[:2])
                sigreg_cases.check_sums(kernels, z, sigreg_cases.unit(*shape[1:]), knots)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_strides(kernels, layout):
    check("cuda", LAYOUTS[layout](12, 24).requires_grad_(), 9)
    directions = LAYOUTS[layout](24, 9)
    for z in (
        randn(12, 4, 24).transpose(0, 1),
        randn(24, 12, 4).permute(2, 1, 0),
        randn(8, 12, 48)[::2, :, 24:],
        randn(1, 12, 24).expand(4, 12, 24),
        randn(4, 1, 24).expand(4, 12, 24),
    ):
        sigreg_cases.check_sums(kernels, z, directions, KNOTS["17"])
        strided = kernels.sums(z, directions, KNOTS["17"])
        dense = kernels.sums(z.contiguous(), directions.contiguous(), KNOTS["17"])
        for a, b in zip(strided, dense, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    grad, coefficients, p = torch.ones(1), torch.randn(2, 2, 3, 9), torch.randn(2, 5, 9)
    args = (grad, coefficients, p)
    torch.testing.assert_close(
        kernels.gradient(*args, directions, KNOTS["free"]),
        kernels.gradient(*args, directions.contiguous(), KNOTS["free"]),
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (2, 300)])
def test_statistic(kernels, shape):
    for knots, ranks in (("17", 1.0), ("10", 4.0), ("free", 2.0)):
        sigreg_cases.check_statistic(kernels, *shape, KNOTS[knots], ranks)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 67, 130])
def test_directions(kernels, dim):
    for slices, seed, step in ((1, 0, 0), (9, -3, 2**40 + 5), (40, 2**62 + 9, 7)):
        sigreg_cases.check_directions(kernels, dim, slices, seed, step)


# Coefficients and upstream gradients whose waves leave float16 at either end, or whose scale does.
@pytest.mark.parametrize(
    ("scale", "grad"), [(1e-9, 1e9), (1e-3, 1e-3), (1e6, 1e-6), (1e-32, 1e32), (1e30, 1e-30)]
)
def test_float16_waves_keep_their_digits(kernels, scale, grad):
    sigreg_cases.check_gradient(
        kernels, 20, 30, 200, KNOTS["17"], torch.float16, 2, scale=scale, grad=grad
    )
    nothing = kernels.gradient(
        torch.ones(1), torch.zeros(1, 2, 16, 5), torch.randn(1, 3, 5),
        sigreg_cases.unit(4, 5, torch.float16), KNOTS["17"],
    )  # fmt: skip
    assert not nothing.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(kernels, bad):
    sigreg_cases.same_finiteness("cuda", bad)
    for dtype in DTYPES:
        grad = kernels.gradient(
            torch.tensor([bad]), torch.ones(1, 2, 16, 3), torch.ones(1, 2, 3),
            sigreg_cases.unit(4, 3, dtype), KNOTS["17"],
        )  # fmt: skip
        assert not grad.isfinite().any()


def test_any_order_of_blocks_gives_the_same_bits(monkeypatch):
    inputs = {dtype: randn(2, 140, 9, dtype=dtype).requires_grad_() for dtype in DTYPES}
    runs_by_seed = []
    for seed in (0, 1, 2):
        monkeypatch.setenv("EMULATOR_SEED", str(seed))
        runs = [
            differentiate(lambda z: sigreg_loss(z, slices=70, step=3, backend="cuda"), z)
            for z in inputs.values()
        ]
        runs_by_seed.append([t for run in runs for t in (*run.values, *run.gradients)])
    for other in runs_by_seed[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs_by_seed[0], strict=True))


SANITIZED = """
import sys, torch
from tests.helpers import native
sys.path.insert(0, ".")
from tests.sigreg import cases as sigreg_cases
from tests.sigreg.cases import KNOTS
from vicreg_kernels.core import loader
from vicreg_kernels.sigreg import contract
library, mode = sys.argv[1:]
torch.ops.load_library(library)
kernels = loader.compiled("sigreg", contract.Kernels, "vicreg_kernels_emulator")
if mode == "short":
    sums = native.shortened(torch.zeros(1, 2, 16, 8))
    kernels.statistic(sums, KNOTS["17"], [0.1] * 16, 2.0, 1.0, 1.0)
torch.manual_seed(0)
float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
for knots, dtype in (("17", float32), ("10", float16), ("most", bfloat16), ("squares", float16)):
    z, directions = torch.randn(1, 41, 3), sigreg_cases.unit(3, 33)
    sigreg_cases.check_sums(kernels, z, directions, KNOTS[knots])
    sigreg_cases.check_gradient(kernels, 41, 5, 33, KNOTS[knots], dtype, 2)
sigreg_cases.check_statistic(kernels, 2, 33, KNOTS["17"], 1.0)
sigreg_cases.check_directions(kernels, 7, 9, 5, 2**33)
print("clean")
"""


def run_sanitized(mode):
    return native.run_sanitized(SANITIZED, native.emulated("sigreg", sanitize=True), mode)


@pytest.mark.thorough
def test_sanitized():
    done = run_sanitized("plain")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


@pytest.mark.thorough
def test_the_sanitizer_sees_short_sums():
    done = run_sanitized("short")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
