"""Tier 4: the Triton kernels' numerics, run by Triton's interpreter on CPU tensors.

Tiles are small there, so that small inputs take several.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.shapes import LAYOUTS, randn
from tests.helpers.tolerances import differentiate, relative_error
from tests.sigreg import cases as sigreg_cases
from tests.sigreg.cases import KNOTS, check
from vicreg_kernels.core import loader, units
from vicreg_kernels.sigreg import contract, sigreg_loss

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.interpreted
class TestInterpreter:
    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch):
        from vicreg_kernels.sigreg.triton import launch as launchers

        monkeypatch.setattr(launchers, "SUMS", ((32, 32, 16, 16, 3),))
        monkeypatch.setattr(launchers, "PRODUCT", ((32, 16, 32, 4, 3),))
        monkeypatch.setattr(launchers, "WAVES", (32, 32, 4))
        monkeypatch.setattr(launchers, "STATISTIC", (2, 32, 4))
        monkeypatch.setattr(launchers, "DIRECTIONS", (8, 8, 4))

    @pytest.fixture
    def kernels(self) -> contract.Kernels:
        return loader.load("sigreg", contract.Kernels, "triton")

    # N, D, M: one of each, odd, prime, off the tiles by one, and whole 16 bytes.
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(9, 1, 3), (3, 17, 1), (33, 16, 33), (100, 24, 40)], ids=str)
    @pytest.mark.sampled(2)
    def test_shapes(self, shape, dtype):
        rows, dim, slices = shape
        check("triton", randn(rows, dim, dtype=dtype).requires_grad_(), slices)

    def test_sizes_in_units_of_16_bytes(self, kernels):
        """The same bits whether strides are known to be whole units or not."""
        z, a = randn(2, 70, 24), sigreg_cases.unit(24, 40)
        general = randn(2, 70, 48)[..., ::2].copy_(z), randn(24, 41)[:, :40].copy_(a)
        assert [units.unit(z, (24, 40)), units.unit(z, (24,), (2,))] == [4, 1]
        args = KNOTS["17"], sigreg_cases.weights(KNOTS["17"]), 70.0, 70.0
        runs = [kernels.forward(*given, *args) for given in ((z, a), general)]
        for one, other in zip(*runs, strict=True):
            assert torch.equal(one, other)
        _, coefficients, p = runs[0]
        outcomes = [
            kernels.gradient(torch.ones(1), coefficients, p, d, args[0]) for d in (a, general[1])
        ]
        assert torch.equal(*outcomes)

    @pytest.mark.parametrize("convention", ["lejepa", "eb_jepa"])
    def test_groups_and_variants(self, convention):
        z = randn(35, 2, 6).transpose(0, 1)
        check("triton", z.requires_grad_(), 20, convention=convention)

    @pytest.mark.parametrize("knots", KNOTS)
    @pytest.mark.sampled(2)
    def test_every_kind_of_knots(self, kernels, knots):
        """Projections up to 50 and beyond, where an angle in float32 has lost its last digits."""
        z, directions = 17.0 * torch.randn(1, 33, 7), sigreg_cases.unit(7, 20)
        sigreg_cases.check_sums(kernels, z, directions, KNOTS[knots])
        sigreg_cases.check_gradient(kernels, 20, 9, 33, KNOTS[knots], spread=17.0)

    def test_every_number_of_pairs(self, kernels):
        """Of both kinds, whole and with a knot too many; of one projection, whose error nothing
        averages out."""
        z, directions = 2.0 * torch.randn(1, 1, 1), sigreg_cases.unit(1, 1)
        for count in (2, 3, 5, 8, 15, 17):
            for start in (1.0, 0.5):
                knots = [0.3 * (start + k) for k in range(count)]
                sigreg_cases.check_sums(kernels, z, directions, knots)

    def test_strides(self, kernels):
        directions = LAYOUTS["strided"](24, 9)
        for z in (
            randn(24, 12, 2).permute(2, 1, 0),
            randn(4, 12, 48)[::2, :, 24:],
            randn(1, 1, 24).expand(2, 12, 24),
        ):
            strided = kernels.sums(z, directions, KNOTS["two"])
            dense = kernels.sums(z.contiguous(), directions.contiguous(), KNOTS["two"])
            assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))
        args = (torch.ones(1), torch.randn(2, 2, 2, 9), torch.randn(2, 5, 9))
        assert torch.equal(
            kernels.gradient(*args, directions, KNOTS["two"]),
            kernels.gradient(*args, directions.contiguous(), KNOTS["two"]),
        )

    @pytest.mark.parametrize("shape", [(1, 1), (3, 40)], ids=str)
    def test_statistic(self, kernels, shape):
        for knots, ranks in (("17", 1.0), ("free", 4.0)):
            sigreg_cases.check_statistic(kernels, *shape, KNOTS[knots], ranks)

    @pytest.mark.parametrize("dim", [1, 3, 4, 67])
    def test_directions(self, kernels, dim):
        for slices, seed, step in ((1, 2**62 + 9, 0), (9, -3, 2**40 + 5)):
            sigreg_cases.check_directions(kernels, dim, slices, seed, step)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, bad):
        sigreg_cases.same_finiteness("triton", bad)

    @pytest.mark.parametrize(("scale", "grad"), [(1e-9, 1e9), (1e6, 1e-6)])
    def test_float16_waves_keep_their_digits(self, kernels, scale, grad):
        sigreg_cases.check_gradient(
            kernels, 20, 30, 50, KNOTS["two"], torch.float16, scale=scale, grad=grad
        )

    def test_tf32_when_the_user_allows_it(self, monkeypatch):
        """Operands rounded to 10 bits: seen in the error, and held to it."""
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        z, directions = randn(12, 40).requires_grad_(), sigreg_cases.unit(40, 20)
        runs = [
            differentiate(
                lambda z, b=b: sigreg_loss(z, directions=directions, backend=b),
                z.detach().to(dtype).requires_grad_(),
            )
            for b, dtype in (("triton", torch.float32), ("reference", torch.float64))
        ]
        assert 1e-5 < relative_error(runs[0].gradients[0], runs[1].gradients[0]) < 2e-3
        assert relative_error(runs[0].values[0], runs[1].values[0]) < 1e-3

    def test_two_runs_are_bitwise_equal(self):
        z = randn(40, 9).requires_grad_()
        first, second = (
            differentiate(lambda z: sigreg_loss(z, slices=20, step=3, backend="triton"), z)
            for _ in range(2)
        )
        assert torch.equal(first.values[0], second.values[0])
        assert torch.equal(first.gradients[0], second.gradients[0])

    def test_the_largest_tile_that_fills_the_device(self):
        from vicreg_kernels.sigreg.triton import launch as launchers

        z, choices = torch.empty(1), ((64, 64, 1), (32, 32, 2))
        assert launchers._tile(choices, z, 1, 128, 128) == (64, 64, 1)
        assert launchers._tile(choices, z, 1, 64, 128) == (32, 32, 2)
        assert launchers._tile(choices, z, 2, 64, 128) == (64, 64, 1)
