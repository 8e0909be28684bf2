"""Tier 4: the Triton kernels' numerics, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from tests.barlow.test_cpu import CANCELLING, LAMBD, projected_out
from tests.barlow.views import AGREEING, rounded_alike
from tests.helpers.shapes import LAYOUTS, collapsed, randn
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

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SETTINGS = (1e-5, 0.0, False, LAMBD)
# Tiles so small that every loop runs several times, ends ragged, and splits and merges.
TINY = {
    "statistics": (8, 32, 4),
    "block_rows": 16,
    "product": (16, 16, 4, 3),
    "occupancy": 8,
    "least_steps": 1,
    "combine": (8, 2, 4),
    "squares": (8, 16, 4),
    "gradient": (16, 32, 16, 4, 3),
    "finish": (8, 32, 4),
    "finish_occupancy": 1,
}


def views(rows, dim, dtype="fp32", correlation=0.3):
    x, y = randn(rows, dim), randn(rows, dim)
    y = 0.7 * y + correlation * x + 2.0
    return [z.to(FLOATS[dtype]).requires_grad_() for z in (x, y)]


def check(x, y, floor=0.0, **settings):
    function = partial(barlow_twins_loss, **settings)
    return assert_matches_reference(function, "triton", x, y, cotangents=(-1.7,), floor=floor)


@pytest.fixture
def reconfigure(monkeypatch):
    """reconfigure(field=...) changes the launch configuration, for every shape and format."""
    from vicreg_kernels.barlow.triton import configs

    shipped = configs.choose

    def change(**fields):
        changed = lambda *key: dataclasses.replace(shipped(*key), **fields)  # noqa: E731
        monkeypatch.setattr(configs, "choose", changed)

    return change


@pytest.mark.interpreted
class TestInterpreter:
    @pytest.mark.parametrize("shape", [(2, 2), (2, 3), (3, 2), (2, 1), (5, 5), (3, 67)], ids=str)
    @pytest.mark.parametrize("convention", ["barlow_twins", "stable_pretraining"])
    @pytest.mark.sampled(3)
    def test_small_shapes(self, shape, convention):
        x, y = views(*shape)
        check(x, y, projected_out(x, y, 0.5) if shape[0] <= 5 else 0.0, convention=convention)

    @pytest.mark.parametrize("shape", [(20, 70), (70, 20)], ids=str)
    def test_several_tiles(self, shape):
        check(*views(*shape))

    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    @pytest.mark.parametrize("shape", [(13, 67), (67, 13)], ids=str)
    def test_half_inputs(self, shape, dtype):
        check(*views(*shape, dtype))

    @pytest.mark.parametrize("convention", list(CONVENTIONS))
    def test_conventions(self, convention):
        check(*views(7, 12), convention=convention, lambd=-0.2, eps=0.5)
        check(*views(12, 7), convention=convention)

    @pytest.mark.parametrize("layout", list(LAYOUTS))
    @pytest.mark.sampled(2)
    def test_layouts(self, layout):
        for shape in ((7, 19), (19, 7)):
            x = LAYOUTS[layout](*shape).requires_grad_()
            y = LAYOUTS["transposed"](*shape).requires_grad_()
            check(*((x, y) if shape[0] < shape[1] else (y, x)))

    @pytest.mark.parametrize("wanted", [0, 1])
    @pytest.mark.parametrize(
        ("shape", "dtype"), [((5, 9), "fp32"), ((9, 5), "fp32"), ((5, 9), "bf16")], ids=str
    )
    @pytest.mark.sampled(3)
    def test_gradient_of_one_view_alone(self, shape, dtype, wanted):
        inputs = views(*shape, dtype)
        inputs[1 - wanted].requires_grad_(False)
        check(*inputs)

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [((19, 60), "fp32"), ((60, 21), "fp32"), ((17, 40), "bf16")],
        ids=str,
    )
    def test_split_and_merged_launches(self, reconfigure, shape, dtype):
        from vicreg_kernels.barlow.triton import launch as launchers

        reconfigure(**TINY)
        x, y = views(*shape, dtype)
        problem = launchers.LaunchPlan(x, y, 1e-5, 0.0, False, False)
        assert (launchers._row_blocks(problem, 2)[0] > 1) == (dtype == "fp32")
        assert launchers._splits(problem, 6)[0] > 1
        outcome = check(x, y)
        again = differentiate(
            lambda x, y: barlow_twins_loss(x, y, backend="triton"), x, y, cotangents=(-1.7,)
        )
        for a, b in zip(outcome.gradients, again.gradients, strict=True):
            assert torch.equal(a, b), "two runs differ"

    @pytest.mark.parametrize("shape", [(33, 36), (36, 33)], ids=str)
    def test_whole_products_of_several_tiles(self, reconfigure, shape):
        reconfigure(**{**TINY, "occupancy": 0, "inner": (16, 1, 4), "finish": (2, 32, 4)})
        check(*views(*shape))

    @pytest.mark.parametrize("shape", [(6, 11), (11, 6), (9, 70)], ids=str)
    def test_saved_tensors(self, reconfigure, shape):
        """op.py says what they hold; here they are found in float64, one by one."""
        from vicreg_kernels.barlow.triton.launch import forward

        if shape == (9, 70):
            reconfigure(**TINY)
        x, y = (z.detach() for z in views(*shape))
        out = forward(x, y, *SETTINGS)
        for mine, registered in zip(out, contract.empty_saved(x, "triton"), strict=True):
            assert mine.shape == registered.shape
        _, moments, diagonal, products, standardised = out
        wide = torch.stack([x, y]).double()
        z = torch.stack([standardise(v, *SETTINGS[:3]) for v in wide])
        mean, scatter = moments[:, :2].double().sum(dim=1), moments[:, 2].double()
        torch.testing.assert_close(mean, wide.mean(dim=1), rtol=0, atol=1e-6)
        torch.testing.assert_close(scatter, wide.var(dim=1) * (shape[0] - 1), rtol=1e-6, atol=0)
        correlation = z[0].t() @ z[1] / shape[0]
        torch.testing.assert_close(diagonal.double(), correlation.diagonal(), rtol=1e-5, atol=1e-6)
        assert standardised.numel() == 0
        if shape[0] < shape[1]:
            torch.testing.assert_close(products.double(), z @ z.mT, rtol=1e-5, atol=1e-4)
        else:
            wanted = correlation.fill_diagonal_(0.0)
            torch.testing.assert_close(products[0].double(), wanted, rtol=1e-5, atol=1e-6)
            assert not products[0].diagonal().any()

    @pytest.mark.parametrize("convention", ["barlow_twins", "stable_pretraining"])
    @pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
    def test_collapsed(self, shape, convention):
        x, y = views(*shape)
        with torch.no_grad():
            x[:, ::3] = 0.5
            y[:, 1::3] = -2.0
        check(x, y, convention=convention)
        whole = collapsed(*shape).requires_grad_()
        outcome = differentiate(
            lambda z: barlow_twins_loss(z, z, convention=convention, backend="triton"), whole
        )
        assert outcome.values[0].item() == pytest.approx(shape[1], rel=1e-6)
        assert not outcome.gradients[0].any()

    @pytest.mark.parametrize(("scale", "offset"), [(1e4, 0.0), (1e-4, 0.0), (1.0, 1e4)])
    @pytest.mark.parametrize("shape", [(20, 35), (35, 20)], ids=str)
    @pytest.mark.sampled(5)
    def test_scales_and_offsets(self, shape, scale, offset):
        """The mean is kept in two floats, so an offset of 1e4 costs neither value nor gradient."""
        check(*(z.detach().mul(scale).add(offset).requires_grad_() for z in views(*shape)))

    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    @pytest.mark.parametrize("case", AGREEING, ids=str)
    @pytest.mark.sampled(3)
    def test_gradients_of_views_that_agree(self, case, dtype):
        """As in test_barlow_emulator.py."""
        shape, agreement, lambd, factor = case
        x, y = views(*shape, dtype, agreement)
        outcome, truth = (
            differentiate(lambda x, y, b=b: barlow_twins_loss(x, y, lambd=lambd, backend=b), *z)
            for b, z in (
                ("triton", (x, y)),
                ("reference", [z.detach().double().requires_grad_() for z in (x, y)]),
            )
        )
        for mine, true in zip(outcome.gradients, truth.gradients, strict=True):
            assert relative_error(mine, true) <= factor * max(torch.finfo(x.dtype).eps, 1e-5)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=str)
    @pytest.mark.sampled(3)
    def test_not_finite(self, shape, bad):
        inputs = views(*shape)
        with torch.no_grad():
            inputs[0][2, 3] = bad
        got, want = (
            differentiate(lambda x, y, b=b: barlow_twins_loss(x, y, backend=b), *inputs)
            for b in ("triton", "reference")
        )
        assert got.values[0].isnan()
        for mine, theirs in zip(got.gradients, want.gradients, strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())

    @pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=str)
    def test_right_or_nan_near_the_ends_of_float32(self, shape):
        for exponent in (-30, -22, -18, 18, 20, 30):
            x, y = (z.detach() * 10.0**exponent for z in views(*shape))
            loss = barlow_twins_loss(x, y, eps=0.0, backend="triton")
            truth = barlow_twins_loss(x.double(), y.double(), eps=0.0)
            assert loss.isnan() == (abs(exponent) > 18), exponent
            assert loss.isnan() or abs(loss - truth) <= 1e-5 * truth, exponent

    @pytest.mark.parametrize("case", ["tight frame", "uncorrelated"])
    def test_cancellation(self, case):
        pair = [z.float().requires_grad_() for z in CANCELLING[case]()]
        wide = [z.detach().double().requires_grad_() for z in pair]
        actual, plain, truth = (
            differentiate(lambda x, y, b=b: barlow_twins_loss(x, y, backend=b), *inputs)
            for b, inputs in (("triton", pair), ("reference", pair), ("reference", wide))
        )
        assert relative_error(actual.values[0], truth.values[0]) <= CANCELLATION
        outcomes = (actual.gradients, plain.gradients, truth.gradients)
        for mine, theirs, true in zip(*outcomes, strict=True):
            allowed = max(CANCELLATION, PLAIN_FACTOR * relative_error(theirs, true))
            assert relative_error(mine, true) <= allowed

    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    def test_half_values_where_the_diagonal_is_most_of_the_squares(self, dtype):
        """As in test_barlow_emulator.py."""
        x, eps = rounded_alike(FLOATS[dtype])
        loss, truth = (
            barlow_twins_loss(z, z, lambd=1e3, eps=eps, backend=backend)
            for z, backend in ((x, "triton"), (x.double(), "reference"))
        )
        assert relative_error(loss, truth) <= 2 * torch.finfo(x.dtype).eps

    @pytest.mark.parametrize("shape", [(9, 67), (67, 9)], ids=str)
    def test_tf32_when_the_user_allows_it(self, shape, monkeypatch):
        """Operands rounded to 10 bits: seen in the error, and held to it."""
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        inputs = views(*shape)
        got, truth = (
            differentiate(lambda x, y, b=b: barlow_twins_loss(x, y, lambd=1.0, backend=b), *z)
            for b, z in (
                ("triton", inputs),
                ("reference", [z.detach().double().requires_grad_() for z in inputs]),
            )
        )
        for grad, true_grad in zip(got.gradients, truth.gradients, strict=True):
            assert 1e-5 < relative_error(grad, true_grad) < 1e-3
        assert relative_error(got.values[0], truth.values[0]) < 1e-3
