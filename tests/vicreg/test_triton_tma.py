"""Tier 4: VICReg's Triton products with TMA operands in the interpreter; what takes them."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.shapes import LAYOUTS, dominated, randn
from tests.helpers.tolerances import assert_matches_reference, differentiate, relative_error
from tests.vicreg.launches import (
    FLOATS,
    TERMS,
    assert_alike_where_not_finite,
    reconfiguring,
    views,
)
from vicreg_kernels import variance_covariance, vicreg_loss, vicreg_terms

SETTINGS = (1.0, 1e-4, True, [1.0, 0.5, 0.1], [25.0, 25.0, 1.0])


@pytest.fixture
def tma_from(monkeypatch):
    """tma_from(side, arch): the least min(N, D) of the products with TMA operands, and the GPU."""
    from vicreg_kernels.core.triton import device as devices
    from vicreg_kernels.vicreg.triton import configs

    def change(side, arch=90):
        monkeypatch.setattr(configs, "tma_side", lambda device: side)
        gpu = devices.Device("default", 4, arch // 10)
        monkeypatch.setattr(devices, "device", lambda index: gpu)

    return change


def test_which_inputs_take_tma_operands(tma_from):
    from vicreg_kernels.vicreg.triton import tma

    def takes(rows, dim, dtype=torch.bfloat16):
        return tma.takes(torch.empty(1, rows, dim, dtype=dtype, device="meta"))

    for arch, taken in ((80, False), (90, True), (100, True), (120, False)):
        tma_from(1024, arch)
        assert takes(1024, 8192) is taken
    tma_from(1024)
    assert takes(8192, 1024, torch.float16)
    assert not takes(2048, 2048, torch.float32)
    assert not takes(1016, 8192)
    assert not takes(8192, 1016)
    assert takes(1025, 1024)  # a column of 1025 rows is no row of an operand
    assert not takes(2048, 1025)
    assert not takes(1025, 2048)  # but a row of the Gram matrix is
    assert takes(1032, 2048)
    tma_from(None)
    assert not takes(2048, 8192)


def test_what_is_saved_for_tma_operands(tma_from):
    from vicreg_kernels.vicreg import contract

    tma_from(16)
    for dtype, saved in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, False)):
        x = torch.empty(1, 24, 16, dtype=dtype, device="meta")
        _, _, squares, _, _, centred = contract.empty_saved(x, 2, "triton")
        assert squares.dtype == (dtype if saved else torch.float32)
        assert centred.shape == ((2, 1, 24, 16) if saved else (0,))
        assert centred.dtype == (dtype if saved else torch.float32)


def test_the_least_side_is_that_of_the_table():
    from vicreg_kernels.vicreg.triton import configs

    assert configs.tma_side("a GPU that is not in the table") == 1024
    for shape in ((1024, 1024), (2048, 65536), (70000, 1500)):
        config = configs.nearest("a GPU that is not in the table", "bf16", 64, 64)
        assert not config.tma
        assert configs.with_tma(config, *shape).tma


@pytest.fixture
def reconfigure(monkeypatch):
    return reconfiguring(monkeypatch)


# In tiles of 16 the interpreter takes seconds a test.
@pytest.fixture(
    params=[
        pytest.param((16, 16), id="square"),
        pytest.param((16, 32), id="wide", marks=pytest.mark.thorough),
    ]
)
def tiny_tma(reconfigure, tma_from, request):
    """TMA operands for every shape, in tiles so small that bands and edges occur."""
    tma_from(2)
    tiles = (*request.param, 16, 4, 3, 2)
    reconfigure(statistics=(8, 32, 4), strips=(8, 16, 4), tma_product=tiles, tma_gradient=tiles)


# Row and column counts off the tiles, one tile, several bands.
SHAPES = [(8, 16), (33, 8), (40, 104), (104, 40), (99, 40), (64, 64)]


@pytest.mark.interpreted
class TestTmaOperands:
    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_against_the_reference(self, tiny_tma, shape, dtype):
        inputs = views(*shape, FLOATS[dtype])
        assert_matches_reference(vicreg_terms, "triton", *inputs, cotangents=TERMS)

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
    def test_layouts_and_the_gradient_of_one_view(self, tiny_tma, shape):
        x = LAYOUTS["transposed"](*shape).bfloat16().requires_grad_()
        y = LAYOUTS["sliced"](*shape).bfloat16()
        assert_matches_reference(vicreg_loss, "triton", x, y)
        assert_matches_reference(vicreg_loss, "triton", y, x)

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24)], ids=str)
    def test_groups_of_one_view(self, tiny_tma, shape):
        z = randn(*shape).bfloat16().requires_grad_()
        assert_matches_reference(variance_covariance, "triton", z, cotangents=(0.6, -1.7))

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("shape", [(40, 104), (104, 40)], ids=str)
    def test_saved_tensors(self, tiny_tma, shape):
        from vicreg_kernels.vicreg.triton.launch import forward

        rows, dim = shape
        z = (randn(2, 1, *shape) * torch.linspace(1, 3, dim)).bfloat16()
        _, _, squares, deflated, index, centred = forward(*z.unbind(), *SETTINGS)
        exact = z.double() - z.double().mean(dim=-2, keepdim=True)
        zc = exact.bfloat16().double()
        gram = rows < dim
        left_out = torch.zeros(2, 1, 1, dim, dtype=torch.bool)
        if gram:
            chosen = zc.square().sum(dim=-2).topk(4).indices
            assert torch.equal(index.sort().values, chosen.sort().values)
            left_out.scatter_(3, index[:, :, None], True)
            assert deflated.isfinite().all()
        # A mean summed in another order may round a value the other way.
        operand = torch.where(left_out, 0.0, zc)
        assert centred.dtype == squares.dtype == torch.bfloat16
        torch.testing.assert_close(centred.double(), operand, rtol=2**-7, atol=1e-6)
        assert (centred.double() != operand).double().mean() < 0.01
        whole = torch.where(left_out, exact, zc)  # the columns left out are brought back unrounded
        wanted = whole @ whole.mT if gram else zc.mT @ zc
        if not gram:
            wanted.diagonal(dim1=-2, dim2=-1).zero_()
            assert torch.equal(
                squares.diagonal(dim1=-2, dim2=-1), torch.zeros_like(squares[..., 0])
            )
        torch.testing.assert_close(squares.double(), wanted, rtol=2**-7, atol=1e-1)

    @pytest.mark.thorough
    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    def test_dominated_beyond_the_deflated_columns(self, tiny_tma, dtype):
        z = dominated(120, 136, 100.0, 5).to(FLOATS[dtype])
        truth = variance_covariance(z.double(), backend="reference")[1]
        value = variance_covariance(z, backend="triton")[1]
        assert relative_error(value, truth) <= torch.finfo(FLOATS[dtype]).eps / 4

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
    def test_not_finite(self, tiny_tma, shape, bad):
        inputs = views(*shape, torch.bfloat16)
        with torch.no_grad():
            inputs[0][2, 3] = bad
        # "bf16 in fp32" rounds infinity to NaN
        assert_alike_where_not_finite(inputs, nan=bad != float("inf"))

    @pytest.mark.thorough
    @pytest.mark.parametrize("shape", [(40, 104), (104, 40)], ids=str)
    def test_two_runs_are_bitwise_equal(self, tiny_tma, shape):
        inputs = views(*shape, torch.bfloat16)
        first, second = (
            differentiate(lambda *z: vicreg_terms(*z, backend="triton"), *inputs) for _ in range(2)
        )
        for a, b in zip(
            first.values + first.gradients, second.values + second.gradients, strict=True
        ):
            assert torch.equal(a, b)
