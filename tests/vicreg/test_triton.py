"""Tier 4: the Triton kernels' numerics, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.helpers.shapes import LAYOUTS, collapsed, dominated, randn, white
from tests.helpers.tolerances import (
    CANCELLATION,
    assert_close_to_truth,
    assert_matches_reference,
    column_errors,
    differentiate,
    relative_error,
)
from tests.vicreg.launches import (
    FLOATS,
    TERMS,
    assert_alike_where_not_finite,
    reconfiguring,
    views,
)
from vicreg_kernels import variance_covariance, vicreg_loss, vicreg_terms

# N < D, N = D, N > D: 2, 3, odd, prime, off the tiles by one, several tiles.
SHAPES = [(2, 2), (2, 3), (3, 2), (2, 1), (3, 4), (5, 5), (2, 67), (67, 2), (17, 13), (13, 17)]
TILED = [(31, 67), (65, 70), (129, 65), (64, 64)]
SETTINGS = (1.0, 1e-4, True, [1.0, 0.5, 0.1], [25.0, 25.0, 1.0])


@pytest.fixture
def reconfigure(monkeypatch):
    return reconfiguring(monkeypatch)


@pytest.mark.interpreted
class TestInterpreter:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.sampled(2)
    def test_small_shapes(self, shape):
        assert_matches_reference(vicreg_terms, "triton", *views(*shape), cotangents=TERMS)

    @pytest.mark.parametrize("shape", TILED, ids=str)
    @pytest.mark.sampled(2)
    def test_several_tiles(self, shape):
        assert_matches_reference(vicreg_loss, "triton", *views(*shape))

    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    @pytest.mark.parametrize("shape", [(2, 3), (5, 3), (13, 67), (67, 13)], ids=str)
    @pytest.mark.sampled(3)
    def test_half_inputs(self, shape, dtype):
        inputs = views(*shape, FLOATS[dtype])
        assert_matches_reference(vicreg_terms, "triton", *inputs, cotangents=TERMS)

    @pytest.mark.parametrize("unbiased", [True, False])
    @pytest.mark.parametrize("shape", [(9, 5), (3, 6, 4), (3, 4, 6), (1, 5, 5)], ids=str)
    def test_one_view_and_groups(self, shape, unbiased):
        function = partial(variance_covariance, unbiased=unbiased, covariance_normalizer="d(d-1)")
        z = randn(*shape).requires_grad_()
        assert_matches_reference(function, "triton", z, cotangents=(0.6, -1.7))

    @pytest.mark.parametrize("shape", [(6, 2, 2, 9), (9, 3, 4)], ids=str)
    def test_positions_of_two_views(self, shape):
        x, y = randn(*shape).requires_grad_(), randn(*shape).requires_grad_()
        assert_matches_reference(partial(vicreg_loss, convention="lightly"), "triton", x, y)

    @pytest.mark.parametrize("layout", list(LAYOUTS))
    @pytest.mark.parametrize("shape", [(7, 19), (19, 7)], ids=str)
    @pytest.mark.sampled(3)
    def test_layouts(self, shape, layout):
        x = LAYOUTS[layout](*shape).requires_grad_()
        y = LAYOUTS["transposed"](*shape).requires_grad_()
        assert_matches_reference(vicreg_loss, "triton", x, y)
        assert_matches_reference(vicreg_loss, "triton", y, x)

    @pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=str)
    @pytest.mark.parametrize("wanted", [0, 1])
    def test_gradient_of_one_view_alone(self, shape, wanted):
        inputs = views(*shape)
        inputs[1 - wanted].requires_grad_(False)
        assert_matches_reference(vicreg_terms, "triton", *inputs, cotangents=TERMS)

    # Tiles so small that every loop runs several times, ends ragged, and splits and merges.
    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [((19, 44), "fp32"), ((50, 21), "fp32"), ((33, 33), "fp32"), ((18, 37), "bf16")],
        ids=str,
    )
    @pytest.mark.sampled(2)
    def test_split_and_merged_launches(self, reconfigure, monkeypatch, shape, dtype):
        from vicreg_kernels.vicreg.triton import launch as launchers

        reconfigure(
            statistics=(8, 32, 4), block_rows=16, product=(16, 16, 4, 3), occupancy=8,
            strips=(8, 16, 4), gradient=(16, 32, 16, 4, 3),
        )  # fmt: skip
        problem = launchers.LaunchPlan(torch.empty(1, *shape), torch.empty(1, *shape), True, False)
        assert launchers._row_blocks(problem, 2)[0] > 1
        assert launchers._splits(problem, 6)[0] == max(1, max(shape) // min(shape))
        inputs = views(*shape, FLOATS[dtype])
        assert_matches_reference(vicreg_terms, "triton", *inputs, cotangents=TERMS)

    def test_whole_covariance_product_of_several_tiles(self, reconfigure):
        reconfigure(product=(16, 16, 4, 3), occupancy=0)
        assert_matches_reference(vicreg_loss, "triton", *views(50, 45))

    @pytest.mark.parametrize("shape", [(6, 11), (11, 6)], ids=str)
    def test_saved_tensors(self, shape):
        """op.py says what they hold; here they are found in float64, one by one."""
        from vicreg_kernels.vicreg.triton.launch import forward

        rows, dim = shape
        z = (randn(2, 1, *shape) * torch.linspace(1, 3, dim)).double()
        _, moments, squares, deflated, index, centred = forward(*z.float().unbind(), *SETTINGS)
        zc = z - z.mean(dim=-2, keepdim=True)
        scatter = zc.square().sum(dim=-2)
        mean = moments[:, :, :2].double().sum(dim=2)
        torch.testing.assert_close(mean, z.float().double().mean(dim=-2), rtol=0, atol=1e-6)
        torch.testing.assert_close(moments[:, :, 2].double(), scatter, rtol=1e-6, atol=0)
        assert centred.numel() == 0
        covariance = zc.mT @ zc
        covariance.diagonal(dim1=-2, dim2=-1).zero_()
        gram = rows < dim
        wanted = zc @ zc.mT if gram else covariance
        torch.testing.assert_close(squares.double(), wanted, rtol=1e-5, atol=1e-4)
        if gram:
            assert torch.equal(index.sort().values, scatter.topk(4).indices.sort().values)
            product = (zc @ covariance).mT  # [V, G, D, N]
            wanted = product.gather(2, index[..., None].expand(*index.shape, rows))
            torch.testing.assert_close(deflated.double(), wanted, rtol=1e-5, atol=1e-3)
        else:
            assert torch.equal(squares.diagonal(dim1=-2, dim2=-1), torch.zeros(2, 1, dim))

    def test_equal_scatters_go_to_the_lowest_columns(self, reconfigure):
        from vicreg_kernels.vicreg.triton.launch import forward

        reconfigure(statistics=(16, 16, 4))
        z = torch.tensor([1.0, -1.0, 1.0])[None, :, None].repeat(1, 1, 40)
        z[..., 30] *= 2.0
        index = forward(z, None, *SETTINGS)[4]
        assert index.flatten().tolist() == [30, 0, 1, 2]

    @pytest.mark.parametrize("dtype", list(FLOATS))
    @pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=str)
    def test_collapsed(self, shape, dtype):
        z = collapsed(*shape, dtype=FLOATS[dtype]).requires_grad_()
        y = randn(*shape, dtype=FLOATS[dtype]).requires_grad_()
        out = assert_matches_reference(vicreg_terms, "triton", z, y, cotangents=TERMS)
        alone = variance_covariance(z, backend="triton")
        assert alone[1] == 0.0
        assert abs(alone[0].item() - 0.99) < 1e-6
        assert out.values[2] > 0.49

    @pytest.mark.parametrize("scale", [1e4, 1e-4])
    @pytest.mark.parametrize("shape", [(7, 19), (19, 7)], ids=str)
    def test_scales(self, shape, scale):
        inputs = [(scale * z.detach()).requires_grad_() for z in views(*shape)]
        assert_matches_reference(vicreg_loss, "triton", *inputs)

    @pytest.mark.parametrize("shape", [(40, 20), (20, 40)], ids=str)
    def test_a_large_common_offset(self, shape):
        """The mean is kept in two floats, so an offset of 1e4 costs neither value nor gradient."""
        inputs = [(z.detach() + 1e4).requires_grad_() for z in views(*shape)]
        assert_matches_reference(vicreg_loss, "triton", *inputs)

    @pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
    def test_float16_at_its_limits(self, shape):
        """A centred value of 1e5 leaves float16; its product must not."""
        x = torch.full(shape, -60000.0)
        x[0] = 60000.0
        x += 256.0 * torch.randn(shape).round()
        z = x.clamp(-65504, 65504).half()
        truth = variance_covariance(z.double(), backend="reference")
        plain = variance_covariance(z, backend="reference")
        for got, true, near in zip(
            variance_covariance(z, backend="triton"), truth, plain, strict=True
        ):
            assert_close_to_truth(got, true, near, torch.float16, max(shape), "limits", 1e-6)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=str)
    def test_not_finite(self, shape, bad):
        inputs = views(*shape)
        with torch.no_grad():
            inputs[0][2, 3] = bad
        assert_alike_where_not_finite(inputs, nan=True)

    def test_columns_of_nan_stay_in_range(self):
        from vicreg_kernels.vicreg.triton.launch import forward

        z = randn(1, 3, 9)
        z[..., 2:9] = float("nan")
        chosen = forward(z, None, *SETTINGS)[4].flatten()
        assert chosen.unique().numel() == 4
        assert 0 <= chosen.min() <= chosen.max() < 9

    # Without the deflated columns the covariance term of the first is off by 7e-4 in float32.
    @pytest.mark.parametrize("count", [1, 3])
    def test_dominated_by_a_few_dimensions(self, count):
        z = dominated(64, 512, 300.0, count).requires_grad_()
        runs = [
            differentiate(lambda z: variance_covariance(z, backend="triton")[1], z),
            differentiate(
                lambda z: variance_covariance(z, backend="reference")[1],
                z.detach().double().requires_grad_(),
            ),
        ]
        (value, true_value), (grad, true_grad) = (
            [r.values[0] for r in runs],
            [r.gradients[0] for r in runs],
        )
        columns = column_errors(grad, true_grad)
        print(
            f"\n64x512, {count} x 300: value {relative_error(value, true_value):.1e}, gradient"
            f" {relative_error(grad, true_grad):.1e}, worst column {columns.max():.1e}"
        )
        assert relative_error(value, true_value) <= CANCELLATION
        assert relative_error(grad, true_grad) <= CANCELLATION
        assert columns.max() <= CANCELLATION

    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    def test_half_dominated_beyond_the_deflated_columns(self, dtype):
        """What is taken off is the scatter of the rounded values; the exact one leaves a third of
        eps here, this a hundredth.
        """
        z = dominated(120, 130, 100.0, 5).to(FLOATS[dtype])
        truth = variance_covariance(z.double(), backend="reference")[1]
        value = variance_covariance(z, backend="triton")[1]
        assert relative_error(value, truth) <= torch.finfo(FLOATS[dtype]).eps / 4

    @pytest.mark.parametrize("shape", [(600, 80), (65, 64)], ids=str)
    def test_near_white(self, shape):
        def covariance(z, backend):
            return variance_covariance(z, backend=backend)[1]

        assert_matches_reference(covariance, "triton", white(*shape).requires_grad_())

    @pytest.mark.parametrize("shape", [(9, 67), (67, 9)], ids=str)
    def test_tf32_when_the_user_allows_it(self, shape, monkeypatch):
        """Operands rounded to 10 bits: seen in the error, and held to it."""
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        inputs = views(*shape)
        loss = partial(vicreg_loss, invariance_weight=0.0, variance_weight=0.0)
        got = differentiate(lambda *z: loss(*z, backend="triton"), *inputs)
        truth = differentiate(
            lambda *z: loss(*z, backend="reference"),
            *(z.detach().double().requires_grad_() for z in inputs),
        )
        for grad, true_grad in zip(got.gradients, truth.gradients, strict=True):
            assert 1e-5 < relative_error(grad, true_grad) < 1e-3
        assert relative_error(got.values[0], truth.values[0]) < 1e-3

    @pytest.mark.parametrize("shape", [(20, 70), (70, 20)], ids=str)
    def test_two_runs_are_bitwise_equal(self, shape):
        inputs = views(*shape)
        first, second = (
            differentiate(lambda *z: vicreg_terms(*z, backend="triton"), *inputs) for _ in range(2)
        )
        for a, b in zip(
            first.values + first.gradients, second.values + second.gradients, strict=True
        ):
            assert torch.equal(a, b)
